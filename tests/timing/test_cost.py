"""Hours, card-hours and dollars."""

from __future__ import annotations

import pytest

from vramplan.errors import InvalidValue
from vramplan.hardware.catalogue import parse_gpu
from vramplan.hardware.prices import list_price
from vramplan.timing.cost import cost
from vramplan.timing.step import StepTime

STEP = StepTime(seconds=0.5, tokens=8192, parts={"forward": 0.5})


def test_a_price_that_is_given() -> None:
    """10^9 / 8192 = 122070.3: 122071 steps of half a second on four cards at 2.50 dollars."""
    found = cost(STEP, 10**9, parse_gpu("4xa100-80gb"), 2.5)
    assert found.steps == 122_071
    assert found.hours == 122_071 * 0.5 / 3600
    assert found.gpu_hours == 4 * found.hours
    assert found.dollars == pytest.approx(found.gpu_hours * 2.5)
    assert found.price_source == "given"


def test_the_list_price_otherwise() -> None:
    found, listed = cost(STEP, 10**9, parse_gpu("h200")), list_price("h200")
    assert listed is not None
    assert found.price == listed.dollars
    assert found.dollars == pytest.approx(found.gpu_hours * listed.dollars)
    assert found.price_source is not None
    assert listed.date in found.price_source


@pytest.mark.parametrize("gpu", ["24GB", "rtx-2060-6gb"])
def test_without_a_price_card_hours(gpu: str) -> None:
    found = cost(STEP, 10**6, parse_gpu(gpu))
    assert (found.dollars, found.price, found.price_source) == (None, None, None)
    assert found.gpu_hours == found.hours == 123 * 0.5 / 3600


def test_a_free_card() -> None:
    assert cost(STEP, 10**6, parse_gpu("h200"), 0).dollars == 0


@pytest.mark.parametrize("price", [-0.01, float("nan")])
def test_a_price_below_zero(price: float) -> None:
    with pytest.raises(InvalidValue, match="price"):
        cost(STEP, 10**6, parse_gpu("h200"), price)


@pytest.mark.parametrize("tokens", [0, -5, 1.5, True])
def test_tokens_that_are_none(tokens: int) -> None:
    with pytest.raises(InvalidValue, match="tokens"):
        cost(STEP, tokens, parse_gpu("h200"))
