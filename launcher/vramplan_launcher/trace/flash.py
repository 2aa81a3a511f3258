"""flash-attn's function on fake tensors: what its kernels are given, give and keep.

transformers calls `flash_attn_func` of the package flash-attn; while `package` is open it calls
`attention` here instead, and the package need not be there. Source: flash-attn 2.8.3,
flash_attn/flash_attn_interface.py (`FlashAttnFunc`) and csrc/flash_attn/flash_api.cpp (`mha_fwd`,
`mha_bwd`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import pad

ALIGN = 8
"""Heads are padded to a multiple of so many elements."""
ROWS = 128
"""To a multiple of so many rows `mha_bwd` rounds the sequence."""
CALLED = "_flash_attention_forward"


def _last_dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """`maybe_contiguous`"""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


class _Attention(torch.autograd.Function):
    """`FlashAttnFunc`: saves q, k, v, the output, its log-sum-exp and a random state."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        width = q.size(3)
        if width % ALIGN:
            q, k, v = (pad(t, [0, -width % ALIGN]) for t in (q, k, v))
        q_in, _, _ = _last_dense(q, k, v)
        out = torch.empty_like(q_in)
        batch, rows, heads, _ = q.shape
        lse = torch.empty((batch, heads, rows), dtype=torch.float32)
        state = torch.empty((2,), dtype=torch.int64)
        ctx.save_for_backward(q, k, v, out, lse, state)
        return out[..., :width]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, out, _, _ = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        (dout,) = grads
        width = dout.size(3)
        if width % ALIGN:
            dout = pad(dout, [0, -width % ALIGN])
        dout, q, k, v, out = _last_dense(dout, q, k, v, out)
        _kernel_work(q, k)
        return tuple(t[..., :width] for t in (dq, dk, dv))


def _kernel_work(q: torch.Tensor, k: torch.Tensor) -> None:
    """`mha_bwd`: a row sum, dq in fp32, and of grouped heads dk and dv of every query head."""
    batch, rows, heads, width = q.shape
    rows = -(-rows // ROWS) * ROWS
    block = 32 if width <= 128 else 64
    work = [
        torch.empty((batch, heads, rows), dtype=torch.float32),
        torch.empty((batch, rows, heads, -(-width // block) * block), dtype=torch.float32),
    ]
    if k.size(2) != heads:
        shape = (batch, k.size(1), heads, width)
        work += [torch.empty(shape, dtype=k.dtype) for _ in range(2)]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """`flash_attn_func`: batch x sequence x heads x width each."""
    if {q.dtype, k.dtype, v.dtype} - {torch.float16, torch.bfloat16}:
        raise ValueError("FlashAttention only support fp16 and bf16 data type")
    return _Attention.apply(q, k, v)


def packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> torch.Tensor:
    """`flash_attn_varlen_func`: for padded or packed sequences, which a trace has none of."""
    raise NotImplementedError("a trace has neither padding nor packed sequences")


@contextlib.contextmanager
def package() -> Iterator[None]:
    """While open, transformers finds flash-attn installed, and it is this module."""
    from transformers import modeling_flash_attention_utils as utils

    table: Any = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    found, imports = table[2], utils._lazy_imports

    def here(implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if implementation != "flash_attention_2":
            return imports(implementation, *args, **kwargs)
        return attention, packed, None, utils._pad_input, utils._unpad_input

    table[2] = {
        **found,
        "general_availability_check": lambda: True,
        "custom_supported_devices": ((lambda: True, "traced"),),
    }
    utils._lazy_imports, utils._loaded_implementation = here, None
    utils.lazy_import_flash_attention("flash_attention_2")  # some models ask for what is loaded
    without = _without_import()
    for module in without:
        module.__dict__[CALLED] = utils._flash_attention_forward
    try:
        yield
    finally:
        for module in without:
            del module.__dict__[CALLED]
        table[2], utils._lazy_imports, utils._loaded_implementation = found, imports, None


def _without_import() -> list[Any]:
    """Models' modules that import it only where the package was found when they were loaded."""
    return [
        module
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.")
        and "is_flash_attn_available" in vars(module)
        and CALLED not in vars(module)
    ]
