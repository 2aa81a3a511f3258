"""What CUDA does otherwise than a CPU build, op by op and by name.

Composite operations choose their path by device in C++, before a dispatch mode sees them, so the
paths of CUDA are registered here in their stead (`cuda_paths`). What a CUDA kernel allocates
inside itself and frees before it returns is in `KERNEL_SCRATCH`. Sources are of torch 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from vramplan_launcher.trace.autocast import override

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def _grad_needed(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(t, torch.Tensor) and t.requires_grad for t in tensors
    )


def _pad_last(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """`pad_last_dim` of ATen/native/transformers/attention.cpp."""
    short = -tensor.size(-1) % multiple
    return torch.nn.functional.pad(tensor, (0, short)) if short else tensor


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`convert_boolean_attn_mask`: a boolean mask becomes an additive one of the query's dtype."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype)
    return torch.where(mask, zero, float("-inf")).to(dtype)


def _aligned_bias(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`preprocess_mask`: the efficient kernel wants rows of the bias aligned to 16 elements."""
    last = mask.size(-1)
    if last % 16:
        mask = torch.nn.functional.pad(mask, (0, 16 - last % 16))[..., :last]
    return mask.expand(q.size(0), q.size(1), q.size(2), k.size(2))


CUDNN_PREFERRED = ("9.0", "10.0")
"""Compute capabilities for which `check_prefer_cudnn_attention` (sdp_utils.cpp) says yes."""
CUDNN_MOST = 256
"""Widest head of cuDNN's kernel there (`check_cudnn_tensor_shapes`)."""


def choose_sdpa_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Any,
    is_causal: bool,
    gqa: bool,
    capability: str = "9.0",
) -> str:
    """The kernel that `_fused_sdp_choice` takes on sm_80 and later.

    "cudnn", "flash", "efficient" or "math". Source: ATen/native/transformers/cuda/sdp_utils.cpp
    (`use_cudnn_attention`, `use_flash_attention`, `use_mem_efficient_attention`); cuDNN's for
    every 16-bit call, with a mask, grouped heads or unequal widths too: measured on an H100.
    """
    if q.dim() != 4 or min(q.size(2), k.size(2)) == 0 or _grad_needed(mask):
        return "math"  # T5 trains its bias: measured on an H100, in bf16 and dropout
    same_heads = q.size(1) == k.size(1) == v.size(1)
    grouped = gqa and q.size(1) % k.size(1) == 0
    rows = all(t.stride(-1) == 1 for t in (q, k, v))
    if (
        capability in CUDNN_PREFERRED
        and q.dtype in HALF
        and all(t.size(-1) <= CUDNN_MOST and t.size(-1) % 8 == 0 for t in (q, k, v))
        and (same_heads or grouped)
        and rows
    ):
        return "cudnn"
    if (
        mask is None
        and q.dtype in HALF
        and q.size(-1) == k.size(-1) == v.size(-1) <= 256
        and (same_heads or grouped)
        and not (is_causal and q.size(2) != k.size(2))
        and rows
    ):
        return "flash"
    align = 4 if q.dtype == torch.float32 else 8
    if (
        q.dtype in (*HALF, torch.float32)
        and same_heads
        and rows
        and q.size(-1) % align == 0
        and v.size(-1) % align == 0
    ):
        return "efficient"
    return "math"


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    capability: str = "9.0",
) -> torch.Tensor:
    """`scaled_dot_product_attention` of ATen/native/transformers/attention.cpp, on CUDA."""
    kernel = choose_sdpa_kernel(query, key, value, attn_mask, is_causal, enable_gqa, capability)
    if kernel == "flash":
        width = query.size(-1)
        scale = scale if scale is not None else 1 / math.sqrt(width)
        q, k, v = (_pad_last(t, 8) for t in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )[0]
        return out if out.size(-1) == width else out[..., :width]
    mask = attn_mask
    if mask is not None:
        mask = _additive(mask, query.dtype)
    if kernel == "cudnn":
        lse = _grad_needed(query, key, value)
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, mask, lse, dropout_p, is_causal, False, scale=scale
        )[0]
    if kernel == "efficient":
        if mask is not None:
            mask = _aligned_bias(mask, query, key)
        lse = _grad_needed(query, key, value, mask)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, lse, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """`dropout` of ATen/native/Dropout.cpp: fused on CUDA (a boolean mask)."""
    if p == 0 or not train or input.numel() == 0:
        return input
    return aten.native_dropout(input, p, True)[0]


def _softmax(op: Any, inner: Any) -> Any:
    """`softmax` with a dtype: CUDA reads fp16 and writes fp32 in one kernel (SoftMax.cpp)."""

    def kernel(self: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if dtype == torch.float32 and self.dtype == torch.float16:
            return inner(self, dim, True)
        source = self if dtype is None else self.to(dtype)
        return inner(source, dim, False)

    return kernel


def _rms_norm(
    input: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`rms_norm_symint` of layer_norm.cpp: one kernel where input and weight are of one dtype."""
    if weight is not None and weight.dtype != input.dtype:
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        return aten.rms_norm.default._op_dk(composite, input, shape, weight, eps)
    return FusedRMSNorm.apply(input, len(shape), weight)


class FusedRMSNorm(torch.autograd.Function):
    """`_fused_rms_norm` (derivatives.yaml): saves its input, its weight and fp32 deviations.

    Built for a CPU it is composite, and no node of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dims: int, weight: Any) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rstd = torch.empty((*x.shape[:-dims], *[1] * dims), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        made = [
            torch.empty_like(t) if w else None for t, w in ((x, wanted[0]), (weight, wanted[2]))
        ]
        return made[0], None, made[1]


@contextlib.contextmanager
def cuda_paths(capability: str = "9.0") -> Iterator[None]:
    """While open, composite operations on CPU tensors take the paths they take on CUDA.

    `capability` is the device's compute capability: it decides the attention kernel.
    """
    library = torch.library.Library("aten", "IMPL")
    kernels = {
        "scaled_dot_product_attention": functools.partial(_sdpa, capability=capability),
        "dropout": _dropout,
        "rms_norm": _rms_norm,
        "softmax.int": _softmax(aten.softmax.int, aten._softmax.default),
        "log_softmax.int": _softmax(aten.log_softmax.int, aten._log_softmax.default),
    }
    try:
        for name, kernel in kernels.items():
            override(library, name, kernel, "AutogradCPU")
        yield
    finally:
        library._destroy()


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _flash_backward(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`mha_bwd` (flash_attn/flash_api.cpp): dq in fp32, softmax_d; dk, dv for every query head."""
    _, q, k, _v = args[:4]
    batch, heads, rows, width = q.shape
    rows = _round_up(rows, 128)
    wide = _round_up(width, 32 if width <= 128 else 64)
    need = batch * heads * rows * (wide + 1) * 4
    if k.size(1) != heads:
        need += 2 * batch * heads * k.size(2) * width * k.element_size()
    return need


def _cudnn_backward(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """cuDNN's workspace: fp32 dq (its width as it is) and a row sum; with grouped heads dk and dv
    of every query head before they are summed. Measured on an H100, head sizes 64 to 256."""
    _, q, k, v = args[:4]
    batch, heads, rows, width = q.shape
    need = batch * heads * rows * (width + 1) * 4
    if k.size(1) != heads:
        need += batch * heads * k.size(2) * (k.size(-1) + v.size(-1)) * k.element_size()
    return int(need)


FEW_INDICES = 3072
"""Up to so many, `embedding_dense_backward_cuda` (cuda/Embedding.cu) adds without sorting."""
ROWS_PER_THREAD = 10
"""NROWS_PER_THREAD of EmbeddingBackwardKernel.cu."""


def _embedding_backward(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`embedding_backward_cuda_kernel` (EmbeddingBackwardKernel.cu): sorted and original indices,
    the segments' offsets, and fp32 sums of at most 10 rows each."""
    count, weights = args[1].numel(), args[2]
    if count <= FEW_INDICES:
        return 0
    segments = min(count, weights)
    partial = count // ROWS_PER_THREAD + segments
    return int(8 * (3 * count + 2 * segments + partial) + 4 * partial * out.size(-1))


def _efficient_backward(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`_efficient_attention_backward` (attention_backward.cu): delta, and dq (wide heads: dk, dv
    too) accumulated in fp32 for 16-bit inputs, in the tiles of the sm_80 kernels."""
    _, q, k, v = args[:4]
    batch, heads, rows, width = q.shape
    need = batch * heads * _round_up(rows, 32) * 4
    if q.dtype == torch.float32:  # measured on an H100, head sizes 64 to 256
        wide = 64 if width <= 64 else _round_up(width, 128)
        return batch * heads * rows * (wide + 2) * 4
    tile_rows, tile_columns = 64, 64
    if 64 < width <= 128:
        tile_rows, tile_columns = 128, 64 if width <= 96 else 128
    need += batch * heads * _round_up(rows, tile_rows) * _round_up(width, tile_columns) * 4
    if width > 128:
        keys = _round_up(k.size(2), tile_columns)
        need += batch * heads * keys * _round_up(width, tile_rows) * 4
        need += batch * heads * keys * _round_up(v.size(-1), tile_rows) * 4
    return need


def _softmax_backward(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`softmax_backward_cuda_out` (SoftMax.cu): grad * output is a tensor of its own."""
    return int(args[0].numel() * args[0].element_size())


def _safe_softmax(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`_safe_softmax` (SoftMax.cpp): where a row is all -inf. Measured on an H100: one boolean
    of the input's shape and nothing else."""
    return int(out.numel())


def _foreach_norm(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`foreach_tensor_norm_cuda` (ForeachReduceOp.cu): one fp32 a chunk of 65536 elements."""
    tensors = args[0]
    return len(tensors) * max(-(-t.numel() // 65536) for t in tensors) * 4


def _accumulating_put(func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> int:
    """`index_put_with_sort_kernel` (cuda/Indexing.cu): linear, sorted and original indices, their
    range, and the second key and value buffers of cub's radix sort; int64 all."""
    if len(args) < 4 or not args[3]:
        return 0
    rows = max(i.numel() for i in args[1] if i is not None)
    return 6 * rows * 8


KERNEL_SCRATCH: dict[Any, Any] = {
    aten.index_put.default: _accumulating_put,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._safe_softmax.default: _safe_softmax,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten.embedding_dense_backward.default: _embedding_backward,
}


def _layer_norm(func: Any, *args: Any, **kwargs: Any) -> Any:
    """On CUDA the mean and the reciprocal deviation of 16-bit inputs are fp32."""
    out, mean, rstd = func(*args, **kwargs)
    if mean.dtype != torch.float32:
        mean, rstd = (torch.empty_like(t, dtype=torch.float32) for t in (mean, rstd))
    return out, mean, rstd


def _in_place(node: str, out_of_place: Any, in_place: Any) -> Any:
    """A backward formula that writes into zeros of its own, except with tensor subclasses.

    Source: torch/csrc/autograd/FunctionsManual.cpp (`areAnyTensorSubclassLike`).
    """

    def kernel(func: Any, *args: Any, **kwargs: Any) -> Any:
        current = torch._C._current_autograd_node()
        if current is None or node not in current.name():
            return out_of_place(*args, **kwargs)
        in_place(*args, **kwargs)
        return args[0]

    return kernel


def _grouped_mm(
    func: Any, mat_a: torch.Tensor, mat_b: torch.Tensor, offs: Any = None, *rest: Any, **kwargs: Any
) -> torch.Tensor:
    """CUDA multiplies fp32 and fp16 groups too, one after the other; the meta function does not.

    Source: `create_grouped_gemm_output_tensor` and `_grouped_mm_fallback` (GroupedMMUtils.h): rows
    padded to 16 bytes.
    """
    size = [mat_a.size(0), mat_b.size(-1)]
    if mat_a.dim() == mat_b.dim() == 2:
        size.insert(0, offs.size(0))
    align = 16 // mat_a.element_size()
    row = _round_up(size[-1], align)
    stride = [row, 1] if len(size) == 2 else [size[1] * row, row, 1]
    return torch.empty_strided(size, stride, dtype=mat_a.dtype)


REPLACED: dict[Any, Any] = {
    aten._grouped_mm.default: _grouped_mm,
    aten.native_layer_norm.default: _layer_norm,
    aten.index_put.default: _in_place(
        "IndexBackward", aten.index_put.default, aten.index_put_.default
    ),
    aten.scatter.src: _in_place("Backward", aten.scatter.src, aten.scatter_.src),
    aten.scatter_add.default: _in_place(
        "GatherBackward", aten.scatter_add.default, aten.scatter_add_.default
    ),
}
"""Operations whose results on CUDA have another shape or type than the meta function's."""


def answer_scalar(tensor: torch.Tensor, source: str) -> Any:
    """What a run on random tokens with an all-ones mask answers where Python asks for a value.

    `source` is the operation that made the tensor: `all` over such a mask is true; comparisons
    (a layer-drop probability of 0, a search for NaN) are false.
    """
    if tensor.dtype == torch.bool:
        return "aten.all" in source or "aten.eq" in source
    return 1.0 if tensor.is_floating_point() else 1


CUBLAS_WORKSPACE = {"9.0": 32 * 2**20}
"""Bytes a handle and stream: `getChosenWorkspaceSize` (ATen/cuda/CublasHandlePool.cpp): 32 MiB
on sm_90, else 4096 KiB x 2 + 16 KiB x 8."""
CUBLAS_WORKSPACE_DEFAULT = 2 * 4096 * 1024 + 8 * 16 * 1024

CUBLASLT_WORKSPACE = 2**20
"""Bytes that stay with a thread once it has run a product with a bias as its epilogue:
`_getWorkspaceSize` (cuda/CUDABlas.cpp), 1024 KiB; measured on an H100."""
