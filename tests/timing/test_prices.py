"""The dated table of list prices."""

from __future__ import annotations

from datetime import date

import pytest

from vramplan.hardware.catalogue import all_gpus
from vramplan.hardware.prices import Price, all_prices, list_price


@pytest.mark.parametrize("price", all_prices(), ids=lambda p: f"{p.gpu} {p.provider}")
def test_every_price_has_card_date_and_source(price: Price) -> None:
    assert price.gpu in {gpu.id for gpu in all_gpus()}
    assert 0.1 < price.dollars < 20
    assert date(2025, 1, 1) <= date.fromisoformat(price.date) <= date(2030, 1, 1)
    assert price.source.startswith("https://")
    assert price.provider


def test_no_provider_twice_for_a_card() -> None:
    keys = [(price.gpu, price.provider) for price in all_prices()]
    assert len(keys) == len(set(keys))


def test_the_lowest_is_taken() -> None:
    listed = [price.dollars for price in all_prices() if price.gpu == "h100-80gb"]
    found = list_price("h100-80gb")
    assert len(listed) > 1
    assert found is not None
    assert found.dollars == min(listed)


def test_none_for_a_card_that_nobody_lists() -> None:
    assert list_price("rtx-2060-6gb") is None
