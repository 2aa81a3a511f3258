"""Seconds of single kernels, the arithmetic written out."""

from __future__ import annotations

import pytest

from vramplan.hardware.catalogue import find
from vramplan.memory.program import powers_of
from vramplan.memory.values import Size
from vramplan.timing.kernels import seconds_of
from vramplan.timing.rates import rates_of
from vramplan.timing.work import Kernel

H200 = rates_of(find("h200"))
TOKENS = Size(1, 1, 1)


def seconds(kind: str, *figures: object, batch: int = 1, seq: int = 2048) -> float:
    return seconds_of(Kernel(kind, figures), H200)(powers_of(batch, seq))


def test_large_product_runs_at_its_share_of_the_peak() -> None:
    took = seconds("product", TOKENS, 4096, 14336, "bf16", "forward", batch=2)
    assert took == pytest.approx(4.4e-6 + 2 * 4096 * 4096 * 14336 / (0.79 * 989e12))
    # measured: 611.0 us
    assert took == pytest.approx(611.0e-6, rel=0.05)


def test_product_in_fp32_takes_the_vector_units() -> None:
    took = seconds("product", TOKENS, 4096, 4096, "fp32", "weight")
    assert took == pytest.approx(4.4e-6 + 2 * 2048 * 4096 * 4096 / (0.76 * 66.9e12))
    assert took == pytest.approx(1316.6e-6, rel=0.05)  # measured


@pytest.mark.parametrize(
    ("rows", "rank", "width", "measured"),
    [(8192, 16, 4096, 19.7e-6), (8192, 64, 14336, 62.2e-6), (2048, 8, 2048, 5.7e-6)],
)
def test_an_adapters_product_takes_its_bytes(
    rows: int, rank: int, width: int, measured: float
) -> None:
    took = seconds("product", TOKENS, width, rank, "bf16", "forward", seq=rows)
    nbytes = 2 * (rows * (width + rank) + width * rank)
    assert took == pytest.approx(4.4e-6 + nbytes / (0.68 * 4800e9))
    assert took == pytest.approx(measured, rel=0.40)


def test_causal_attention_is_half_the_square_and_the_diagonal() -> None:
    figures = ("fused", "forward", 32, 128, 128, "bf16")
    took = seconds("attention", *figures, True, seq=8192)
    flops = 32 * (128 + 128) * (8192**2 + 600 * 8192)
    assert took == pytest.approx(4e-6 + flops / (0.667 * 989e12))
    assert took == pytest.approx(887.5e-6, rel=0.05)  # measured
    masked = seconds("attention", *figures, False, seq=8192)
    assert masked == pytest.approx(4e-6 + 2 * 2 * 32 * 256 * 8192**2 / (0.667 * 989e12))


def test_attention_backward_has_five_products_to_forwards_two() -> None:
    forward = seconds("attention", "fused", "forward", 32, 128, 128, "bf16", True, seq=65536)
    backward = seconds("attention", "fused", "backward", 32, 128, 128, "bf16", True, seq=65536)
    assert backward / forward == pytest.approx(5 / 2 * 0.667 / 0.597, rel=0.01)


def test_heads_of_80_cost_what_heads_of_128_do() -> None:
    one = seconds("attention", "fused", "forward", 32, 80, 80, "bf16", True)
    other = seconds("attention", "fused", "forward", 32, 128, 128, "bf16", True)
    assert one == pytest.approx(other)


@pytest.mark.parametrize(
    ("rows", "columns", "measured"), [(14336, 4096, 74.0e-6), (512, 2048, 7.7e-6)]
)
def test_dequantizing(rows: int, columns: int, measured: float) -> None:
    took = seconds("dequantize", rows * columns, "bf16")
    assert took == pytest.approx(3 * 2.6e-6 + rows * columns / (0.185 * 4800e9))
    assert took == pytest.approx(measured, rel=0.2)


def test_scores_take_their_bytes() -> None:
    operands = Size(32 * 64, 1, 1), Size(32 * 64, 1, 1)
    took = seconds("batched product", operands, Size(32, 1, 2), "bf16", batch=2)
    nbytes = 2 * 2 * (2 * 2048 * 32 * 64 + 32 * 2048 * 2048)
    assert took == pytest.approx(4.4e-6 + nbytes / (0.68 * 4800e9))
    assert took == pytest.approx(158.4e-6, rel=0.15)  # measured


@pytest.mark.parametrize(
    ("experts", "n_out", "n_in", "rows", "padded", "measured"),
    [
        (8, 14336, 4096, 4096, 4096, 741.3e-6),
        (128, 1536, 2048, 32768, 32768, 319.8e-6),
        (64, 2816, 2048, 12288, 64 * 256, 335.1e-6),
    ],
)
def test_experts(
    experts: int, n_out: int, n_in: int, rows: int, padded: int, measured: float
) -> None:
    """Measured with equal shares, in tiles of 128 rows; routed tokens half fill each last one."""
    took = seconds("grouped product", TOKENS, n_in, n_out, "bf16", "forward", experts, seq=rows)
    assert took == pytest.approx(measured * (rows + experts * 64) / padded, rel=0.15)


def test_int8_backward_multiplies_in_the_inputs_dtype() -> None:
    narrow = seconds("int8", TOKENS, 4096, 4096, "bf16", "input", 0)
    wide = seconds("int8", TOKENS, 4096, 4096, "fp32", "input", 0)
    products = [
        seconds("product", TOKENS, 4096, 4096, dtype, "input") for dtype in ("bf16", "fp32")
    ]
    assert wide - narrow == pytest.approx(products[1] - products[0])
    assert wide > 5 * narrow


def test_int8_outliers_cost_a_product_of_their_own() -> None:
    without = seconds("int8", TOKENS, 14336, 4096, "bf16", "forward", 0)
    all_of_them = seconds("int8", TOKENS, 14336, 4096, "bf16", "forward", 5_000_000)
    product = seconds("product", TOKENS, 14336, 4096, "bf16", "forward")
    assert all_of_them > without + product


def test_other_cards_have_the_same_shares_of_their_own_peaks() -> None:
    a100 = rates_of(find("a100-80gb"))
    assert a100.products["bf16"] == pytest.approx(0.79 * 312e12)
    assert a100.bandwidth == pytest.approx(0.90 * 2039e9)
    assert a100.products["fp32"] == pytest.approx(0.76 * 19.5e12)


def test_a_card_without_bf16_multiplies_it_in_fp32() -> None:
    t4 = rates_of(find("t4"))
    assert t4.products["bf16"] == pytest.approx(0.79 * 8.1e12)
    assert t4.products["fp16"] == pytest.approx(0.76 * 65e12)
