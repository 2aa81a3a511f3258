"""CUDA's autocast on CPU tensors.

The trace runs on fake CPU tensors, and the CPU's autocast has other lists than CUDA's
(`torch.pow`, for one, runs in fp32 under CUDA's and in bf16 under the CPU's). Here the kernels of
the `AutocastCPU` key are replaced by CUDA's lists, taken from ATen/autocast_mode.h
(`AT_FORALL_FP32`, `AT_FORALL_FP32_SET_OPT_DTYPE`, `AT_FORALL_PROMOTE`, torch 2.13).
Lower precision operations that both have keep the CPU's own kernels, which cache a cast weight as
CUDA's do; what only the CPU's autocast touches is left alone. Both sets are read from the
dispatcher, which knows CUDA's registrations in a CPU build too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

# fmt: off
FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
    "reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar",
    "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss",
    "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss",
    "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "cdist", "renorm", "logsumexp",
)
SET_OPT_DTYPE = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "sum", "sum.dim_IntList",
)
PROMOTE = ("addcdiv", "addcmul", "atan2", "cross", "dot", "index_put", "tensordot", "scatter_add")
LOWER = ("einsum", "addmv", "addr", "mv", "chain_matmul", "linalg_multi_dot")
# fmt: on
NOT_MODELLED = (
    "convolution",
    "_thnn",
    "lstm",
    "gru",
    "rnn",
    "upsample",
    "frobenius",
    "nuclear",
    "matrix_norm",
    "norm.Scalar",
    "pdist",
    "bilinear",
    "vdot",
)  # fmt: skip
"""Parts of names on CUDA's lists that no decoder uses; a test holds that no other is missing."""


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if _floating(value) and value.dtype not in (dtype, torch.float64):
        return value.to(dtype)
    if isinstance(value, (list, tuple)) and any(_floating(v) for v in value):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def _fp32_kernel(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            args = tuple(_cast(a, torch.float32) for a in args)
            kwargs = {k: _cast(v, torch.float32) for k, v in kwargs.items()}
            return op(*args, **kwargs)

    return kernel


def _set_dtype_kernel(op: Any) -> Any:
    """As `fp32_set_opt_dtype`: asks the op for an fp32 result where the caller named none."""
    position = [a.name for a in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if len(args) > position else kwargs.get("dtype")
        with _without_autocast():
            first = args[0] if args else next(iter(kwargs.values()))
            if given is None and _floating(first) and first.dtype != torch.float64:
                args = args[:position]
                kwargs = {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return kernel


def _promote_kernel(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            tensors = [a for a in args if _floating(a)]
            widest = torch.get_autocast_dtype("cpu")
            if any(t.dtype == torch.float32 for t in tensors):
                widest = torch.float32
            return op(*(_cast(a, widest) for a in args), **kwargs)

    return kernel


def _lower_kernel(op: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return op(*(_cast(a, torch.get_autocast_dtype("cpu")) for a in args), **kwargs)

    return kernel


def override(library: Any, op: Any, kernel: Any, key: str) -> None:
    """Registers a kernel in place of torch's, until the library is destroyed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(op, kernel, key, allow_override=True)


def registered(key: str) -> set[str]:
    """Names of the operations that have a kernel of their own under a dispatch key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::")}


def _plain_kernel(op: Any) -> Any:
    """No casts of its own; of a composite operation, what it is made of has its own."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if composite:
            return op._op_dk(key, *args, **kwargs)
        with _without_autocast():
            return op(*args, **kwargs)

    return kernel


@contextlib.contextmanager
def cuda_lists() -> Iterator[None]:
    """While open, the CPU's autocast casts what CUDA's casts."""
    library = torch.library.Library("aten", "IMPL")
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device="cpu": asked("cpu" if device == "cuda" else device)
    try:
        listed = registered("AutocastCUDA")  # of this torch: 2.13 has rms_norm, 2.11 has not
        left_alone = registered("AutocastCPU") - listed
        for names, make in (
            (sorted(left_alone), _plain_kernel),
            (LOWER, _lower_kernel),
            (FP32, _fp32_kernel),
            (SET_OPT_DTYPE, _set_dtype_kernel),
            (PROMOTE, _promote_kernel),
        ):
            for name in names:
                if name not in listed and make is not _plain_kernel:
                    continue
                op = _overload(name)
                override(library, op, make(op), "AutocastCPU")
        yield
    finally:
        torch.is_autocast_enabled = asked
        library._destroy()
