"""Block descriptions, one class a family, found by transformers' `model_type`."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Decoder
from vramplan.models.blocks.llama import Llama

FAMILIES: dict[str, type[Decoder]] = {"llama": Llama}


def family(name: str) -> type[Decoder]:
    return FAMILIES[name]
