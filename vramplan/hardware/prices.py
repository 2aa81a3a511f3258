"""Public list prices of cards by the hour: a dated table, with sources."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a provider asked for one card, on demand."""

    gpu: str
    """The card's id in gpus.toml."""
    provider: str
    dollars: float
    """US dollars a card and hour."""
    date: str
    source: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.provider}, {self.date}: {self.source}"


@lru_cache(maxsize=1)
def all_prices() -> tuple[Price, ...]:
    """Every price of prices.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = Path(__file__).with_name("prices.toml").read_text(encoding="utf-8")
    return tuple(Price(**entry) for entry in tomllib.loads(text)["price"])


@lru_cache(maxsize=256)
def list_price(gpu: str) -> Price | None:
    """The lowest list price of a card, or None."""
    mine = [p for p in all_prices() if p.gpu == gpu]
    return min(mine, key=lambda p: p.dollars, default=None)
