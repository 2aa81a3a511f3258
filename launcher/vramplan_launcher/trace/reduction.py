"""The buffer that a reduction on CUDA takes when several thread blocks share an output.

A transcription of `setReduceConfig` and `ReduceConfig::global_memory_size`
(ATen/native/cuda/Reduce.cuh, torch 2.13). Summing a batch's rows for a bias gradient takes far
more than its result: tens of MiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

MAX_THREADS = 512
WARP = 32
MIN_VALUES, MAX_VALUES = 16, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Processors:
    """What a reduction asks of the device: multiprocessors, and threads each holds."""

    count: int = 132
    threads: int = 2048


def _div_up(a: int, b: int) -> int:
    return -(-a // b)


def _last_pow2(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


def _coalesced(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) pairs, smallest stride first, merged where they run on."""
    out: list[tuple[int, int]] = []
    for size, stride in sorted(pairs, key=lambda p: p[1]):
        if size == 1:
            continue
        if out and out[-1][0] * out[-1][1] == stride:
            out[-1] = (out[-1][0] * size, out[-1][1])
        else:
            out.append((size, stride))
    return out


def buffer_bytes(tensor: torch.Tensor, dims: list[int], processors: Processors) -> int:
    """Bytes of the buffer and its semaphores for reducing `dims` of `tensor`; 0 where none."""
    if tensor.dim() == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        return 0
    dims = [d % tensor.dim() for d in dims] or list(range(tensor.dim()))
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    reduced = _coalesced([p for i, p in enumerate(pairs) if i in dims])
    kept = _coalesced([p for i, p in enumerate(pairs) if i not in dims])
    if not reduced:
        return 0
    outputs = 1
    for size, _ in kept:
        outputs *= size
    inputs = tensor.numel() // outputs
    fast = not kept or reduced[0][1] < kept[0][1]
    vector, first, second = 1, inputs, outputs
    if fast:
        if reduced[0][1] == 1 and inputs > 128 and not kept and len(reduced) == 1:
            first //= 4
    else:
        first, second = outputs, inputs
        if kept[0][1] == 1:
            vector = _output_vector(kept, reduced)
            first //= vector
    limit = MAX_THREADS // vector
    width_most = _last_pow2(first) if first < limit else limit
    height_most = _last_pow2(second) if second < limit else limit
    width = min(width_most, WARP)
    height = min(height_most, limit // width)
    width = min(width_most, limit // height)
    step_in, step_out = (width, 1) if fast else (1, width)
    if _div_up(inputs, step_in) < min(height * 16, MAX_VALUES):
        return 0
    step_in *= height
    target = processors.count * (processors.threads // (width * height))
    grid = _div_up(outputs // vector, step_out)
    values = _div_up(inputs, step_in)
    if values < MAX_VALUES or grid > target:
        return 0
    shares = max(
        min(_div_up(target, grid), _div_up(values, MIN_VALUES)), _div_up(values, MAX_VALUES)
    )
    if shares <= 1:
        return 0
    size = max(4, tensor.element_size()) * outputs * shares
    return size if fast else size * width * vector


def _output_vector(kept: list[tuple[int, int]], reduced: list[tuple[int, int]]) -> int:
    """`get_output_vec_size`: 4 where the row and every other stride are multiples of it."""
    vector = 4
    for number in [kept[0][0], *(s for _, s in kept[1:]), *(s for _, s in reduced)]:
        while number % vector:
            vector //= 2
    return vector


def scratch(processors: Processors) -> dict[Any, Any]:
    """Scratch rules of the reducing operations."""

    def rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        tensor = args[0]
        dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        return buffer_bytes(tensor, list(dims), processors)

    aten = torch.ops.aten
    return {aten.sum.dim_IntList: rule, aten.sum.default: rule, aten.mean.dim: rule}
