"""Seconds of kernels whose time is more than their bytes: products, attention, dequantization.

Each rule takes a card's rates and a kernel's figures, and gives a function of `powers_of(batch,
seq)`: what does not depend on those is reckoned once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isqrt
from operator import mul
from typing import Any

from vramplan.memory import outliers
from vramplan.memory.program import MONOMIALS, POSITION
from vramplan.memory.values import ITEMSIZE, Size
from vramplan.timing.rates import Rates
from vramplan.timing.work import Kernel

Powers = Sequence[int]
Seconds = Callable[[Powers], float]

ATTENTION_FIXED = {"forward": 4e-6, "backward": 15e-6}
"""Seconds: backward is four kernels."""
DIAGONAL = {"forward": 600, "backward": 1050}
"""Positions: a causal kernel's pace falls with 1 + DIAGONAL / sequence, for its blocks on the
diagonal and its uneven rows (measured from 512 to 8192 on an H200)."""
MASKED = 0.5
"""A kernel's pace with a mask, which it reads and which spares it nothing."""
GROUPED, GROUPED_WEIGHT = 1.25, 1.75
"""Experts' products take so many times what their padded FLOPs or their bytes take."""
TILE = 128
"""Rows of an expert are padded to it."""
MISALIGNED = 2.2
"""Outlier columns are any number: products of an odd number of columns take slow kernels."""
SCATTERED = 8.0
"""index_put_ with accumulate adds row after row of an index: its pace, in elements that go one by
one. Not from a micro-benchmark: what one run of a mixture of experts lacked."""
SORTING = 8
"""Kernels that sort its indices."""
DEQUANTIZING = {"dequantize": 3, "dequantize once": 1}
"""Kernels: the scales' values, their mean, the weight; where scales are not quantized, the last."""


def seconds_of(kernel: Kernel, rates: Rates) -> Seconds:
    """The time of a kernel on a card."""
    rule: Callable[..., Seconds] = _RULES[kernel.kind]
    return rule(rates, *kernel.figures)


def _product(rates: Rates, rows: Size, n_in: int, n_out: int, dtype: str, of: str) -> Seconds:
    width = ITEMSIZE[dtype]
    flops = 2 * rows.numel * n_in * n_out / rates.products[dtype]
    moved = width * rows.numel * (n_in + n_out) / rates.skinny
    weight = width * n_in * n_out / rates.skinny
    place, fixed = POSITION[rows[1:]], rates.product
    if flops > moved and not place:
        took = fixed + max(flops, moved + weight)
        return lambda powers: took
    return lambda powers: fixed + max(flops * powers[place], moved * powers[place] + weight)


def _grouped(
    rates: Rates, rows: Size, n_in: int, n_out: int, dtype: str, of: str, experts: int
) -> Seconds:
    width = ITEMSIZE[dtype]
    flops = 2 * n_in * n_out / rates.products[dtype]
    moved = width * (n_in + n_out) / rates.bandwidth
    weights = width * experts * n_in * n_out / rates.bandwidth
    factor = GROUPED_WEIGHT if of == "weight" else GROUPED
    launches = 1 if rates.grouped and dtype == "bf16" else experts
    place, fixed = POSITION[rows[1:]], rates.product * launches

    def seconds(powers: Powers) -> float:
        count = rows.numel * powers[place]
        padded = count + experts * TILE / 2  # on average half a tile an expert
        return fixed + factor * max(flops * padded, moved * count + weights)

    return seconds


def _folded(rates: Rates, experts: int, n_out: int, n_in: int, rank: int, dtype: str) -> Seconds:
    width = ITEMSIZE[dtype]
    flops = 2 * experts * n_out * n_in * rank / rates.products[dtype]
    took = rates.product + max(flops, 2 * width * experts * n_out * n_in / rates.skinny)
    return lambda powers: took


def _batched(rates: Rates, operands: tuple[Size, Size], out: Size, dtype: str) -> Seconds:
    """Scores and their like: one of three operands is quadratic in the sequence."""
    a, b = operands
    if max(a.seq, out.seq) == 2:
        half, place = max(a.numel, b.numel) if out.seq == 2 else out.numel, POSITION[1, 2]
    else:
        half, place = isqrt(a.numel * b.numel * out.numel), POSITION[0, 0]
    flops = 2 * half / rates.products[dtype]
    polynomial = [0.0] * len(MONOMIALS)
    for size in (a, b, out):
        polynomial[POSITION[size[1:]]] += size.numel * ITEMSIZE[dtype] / rates.skinny
    fixed = rates.product
    return lambda powers: fixed + max(flops * powers[place], sum(map(mul, polynomial, powers)))


def _attention(
    rates: Rates,
    kind: str,
    direction: str,
    heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    causal: bool,
) -> Seconds:
    # products: q k and p v; backward q k again, and two of each size for the gradients
    work = head_dim + value_dim if direction == "forward" else 3 * head_dim + 2 * value_dim
    padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    rate = rates.attention[direction][padded] * min(1.0, head_dim / padded)
    if kind == "efficient":
        rate = rates.efficient[dtype]
    fixed, diagonal = ATTENTION_FIXED[direction], DIAGONAL[direction]
    flops = heads * work / rate
    if not causal:
        flops, diagonal = 2 * flops / MASKED, 0
    square, line, edge = POSITION[1, 2], POSITION[1, 1], flops * diagonal
    return lambda powers: fixed + flops * powers[square] + edge * powers[line]


def _dequantize(kernels: int, rates: Rates, elements: int, dtype: str) -> Seconds:
    took = kernels * rates.kernel + elements / rates.dequantize
    return lambda powers: took


def _scatter(rates: Rates, size: Size) -> Seconds:
    place, each = POSITION[size[1:]], SCATTERED * size.numel / rates.elements
    fixed = SORTING * rates.kernel
    return lambda powers: fixed + each * powers[place]


def _int8(
    rates: Rates, rows: Size, n_in: int, n_out: int, dtype: str, of: str, tail: int
) -> Seconds:
    """bitsandbytes MatMul8bitLt (autograd/_functions.py), kernel by kernel.

    Forward: the input in fp16, its magnitudes, what exceeds the threshold, quantization; the
    product in int8, its result in fp16, then in the input's dtype; the outlier columns' product.
    Backward: the weight in the input's dtype (fp32 behind an upcast norm), scaled, and a product.
    """
    place, tokens = POSITION[rows[1:]], rows.numel
    if of != "forward":
        product = _product(rates, rows, n_in, n_out, dtype, of)
        weight = 2 * n_in * n_out / rates.elements + 2 * rates.kernel
        return lambda powers: weight + product(powers)
    cast = 6 / rates.bandwidth if dtype == "fp32" else 1 / rates.elements
    moved = n_in * (cast + 10 / rates.bandwidth + 1 / rates.elements)
    moved += n_out * 1.7 / rates.elements + 2 * n_in * n_out / rates.integers
    moved, fixed = tokens * moved, 7 * rates.kernel
    if not tail:
        return lambda powers: fixed + moved * powers[place]
    extra = _product(rates, rows, n_in, n_out, "bf16" if dtype != "fp16" else dtype, of)
    columns = tokens * n_in * 2.6 / rates.elements  # taken out, and zeroed where they were
    weight = 3.5 * n_in * n_out / rates.elements

    def seconds(powers: Powers) -> float:
        share = outliers.share(tail, powers[POSITION[1, 1]])
        slow = MISALIGNED if share < 1 else 1.0
        more = columns * powers[place] + weight + slow * extra(powers)
        return fixed + moved * powers[place] + share * more

    return seconds


_RULES: Mapping[str, Any] = {
    "product": _product,
    "grouped product": _grouped,
    "folded product": _folded,
    "batched product": _batched,
    "attention": _attention,
    **{kind: partial(_dequantize, kernels) for kind, kernels in DEQUANTIZING.items()},
    "scatter": _scatter,
    "int8": _int8,
}
