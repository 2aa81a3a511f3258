"""The cards that people train on, and how a person names them.

The figures are in gpus.toml, with a source each; its head says what every key means. The table is
read once, on first need: a bare size ("24GB") never opens it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vramplan.errors import UnknownName, UserError, nearest
from vramplan.hardware.gpu import Gpu, GpuProcess, Gpus
from vramplan.units import GIB, MIB, TIB, format_bytes, parse_size

__all__ = [
    "Gpu",
    "GpuProcess",
    "Gpus",
    "all_gpus",
    "arch_name",
    "find",
    "gpu_by_device_name",
    "gpu_from_driver",
    "nearest_gpu",
    "parse_gpu",
    "search",
    "warnings_for",
]

# No single card comes near; a larger figure is a slip ("24000GB").
_LARGEST_CARD = 2 * TIB
_LARGEST_COUNT = 100_000
# What of a wrong name is repeated in an error.
_SHOWN_TEXT = 60


# --- the table ------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def all_gpus() -> tuple[Gpu, ...]:
    """All cards, in the order of gpus.toml: consumer, workstation, data centre, AMD."""
    table = _table()
    return tuple(_gpu(entry, table["architectures"]) for entry in table["gpu"])


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text)
    return table


def _gpu(entry: Mapping[str, Any], architectures: Mapping[str, Any]) -> Gpu:
    architecture = architectures[entry["arch"]]
    fp16 = _scaled(entry.get("fp16_tflops"), 10**12)
    return Gpu(
        id=entry["id"],
        name=entry["name"],
        vendor="amd" if entry["arch"].startswith("gfx") else "nvidia",
        arch=entry["arch"],
        memory=entry["memory_mib"] * MIB,
        usable=_scaled(entry.get("usable_mib"), MIB),
        memory_is_reported=entry["memory_basis"] == "reported",
        bandwidth=_scaled(entry.get("bandwidth_gb_s"), 10**9),
        fp16=fp16,
        bf16=fp16 if architecture["bf16"] else None,
        fp32=_scaled(entry.get("fp32_tflops"), 10**12),
        compute_capability=entry.get("compute_capability"),
        supports_bf16=architecture["bf16"],
        supports_flash_attention_2=architecture["flash_attention_2"],
        link=entry["link"],
        link_bandwidth=_link_bandwidth(entry["link"], entry.get("link_gb_s")),
        year=entry["year"],
        source=entry["source"],
    )


def _scaled(value: float | None, unit: int) -> int | None:
    return None if value is None else round(value * unit)


def _link_bandwidth(link: str, both_directions_gb_s: float | None) -> int | None:
    """Bytes a second in one direction. PCIe: transfers a second of the generation, one bit each
    on each lane, coded 128 bits in 130 (PCI Express base specification, 3.0 to 5.0)."""
    if both_directions_gb_s is not None:
        return round(both_directions_gb_s * 10**9 / 2)
    pcie = re.match(r"PCIe ([345])\.0 x(\d+)", link)
    if pcie is None:
        return None
    transfers = {"3": 8, "4": 16, "5": 32}[pcie[1]] * 10**9
    return transfers * int(pcie[2]) * 128 // 130 // 8


@lru_cache(maxsize=1)
def _index() -> dict[str, tuple[Gpu, ...]]:
    """Every spelling, normalised, to the cards that it can mean; more than one: ambiguous."""
    index: dict[str, list[Gpu]] = {}
    for entry, gpu in zip(_table()["gpu"], all_gpus(), strict=True):
        keys = {_normalise(name) for name in (gpu.id, gpu.name, *entry.get("aliases", ()))}
        # "T4 16GB" is a T4; "4090" is an RTX 4090, where no other card has that number.
        keys |= {f"{key}{entry['sold_gb']}gb" for key in keys if not key.endswith("gb")}
        keys |= {key.removeprefix("rtx") for key in keys}
        for key in keys:
            index.setdefault(key, []).append(gpu)
    return {key: tuple(gpus) for key, gpus in index.items()}


_DECORATION = re.compile(r"\b(?:nvidia|geforce|amd|radeon|instinct|tesla|generation)\b")
_SPELLED_SIZE = re.compile(r"(\d)\s*(?:gib|gb|g)\b")


def _normalise(name: str) -> str:
    """A spelling without what doesn't count: "NVIDIA GeForce RTX-4090" -> "rtx4090",
    "A100 80 GiB" -> "a10080gb"."""
    text = re.sub(r"[\s_\-/(),]+", " ", name.casefold().replace("geforcertx", "rtx"))
    text = _SPELLED_SIZE.sub(r"\1gb", _DECORATION.sub(" ", text))
    return re.sub(r"[^a-z0-9.]", "", text)


# --- names ----------------------------------------------------------------------------------


def gpu_by_device_name(name: str, memory: int) -> Gpu | None:
    """The card that the driver calls `name`, or None. Of cards that share a name (RTX 3080 with
    10 and 12 GB) the one whose memory is nearest to `memory` bytes."""
    candidates = _index().get(_normalise(name), ())
    return min(candidates, key=lambda gpu: abs(gpu.memory - memory), default=None)


_SIZE = re.compile(r"[-+]?\d+(?:[.,]\d+)?\s*[kmgt]?(?:i?b)?", re.IGNORECASE)
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_COUNT_BEFORE = re.compile(rf"({_NUMBER})\s*[x*\u00d7]\s*(\S.*)", re.IGNORECASE)
# Behind a name the x needs a space before it: MI300X is a name.
_COUNT_BEHIND = re.compile(rf"(.*\S)\s+[x*\u00d7]\s*({_NUMBER})", re.IGNORECASE)


def parse_gpu(text: str) -> Gpus:
    """The cards that a person means: "24GB", "rtx-4090", "RTX 4090", "4xA100-80GB", "T4 x 2".

    A bare size is a card of which nothing else is known; GB and GiB are both 2^30. A name that
    fits cards of different memory is refused ("A100": 40 or 80 GB). Of a data centre card's form
    factors the SXM one is meant ("A100-80GB", "H100"); the others say so in their names (-pcie,
    -nvl).

    Raises UserError: an unknown name (with the nearest), an ambiguous one, a wrong count or size.
    """
    cleaned = " ".join(text.split())
    if not cleaned:
        raise UserError(f"no GPU named: give a size or a name, such as {_EXAMPLES}")
    count, name = _split_count(cleaned)
    # "4090" is a card, "24" a size without its unit: only digits make us look at the table first.
    if _SIZE.fullmatch(name) and not (name.isdigit() and _normalise(name) in _index()):
        return Gpus(gpu=_nominal_gpu(name), count=count, nominal=True)
    return Gpus(gpu=find(name), count=count)


_EXAMPLES = "24GB, rtx-4090 or 4xA100-80GB"


def _split_count(text: str) -> tuple[int, str]:
    if match := _COUNT_BEFORE.fullmatch(text):
        number, name = match[1], match[2]
    elif match := _COUNT_BEHIND.fullmatch(text):
        name, number = match[1], match[2]
    else:
        return 1, text
    digits = number.isascii() and number.isdigit() and len(number) <= len(str(_LARGEST_COUNT))
    if not digits or not 1 <= int(number) <= _LARGEST_COUNT:
        raise UserError(
            f"GPU count is {_short(number)} in {_short(text)}: it must be a whole number from 1 "
            f"to {_LARGEST_COUNT}"
        )
    return int(number), name


def _nominal_gpu(text: str) -> Gpu:
    if text.isdigit():
        raise UserError(
            f"GPU memory {_short(text)} has no unit: a size is written like 24GB, and a card "
            f"by its name, like rtx-4090"
        )
    # A number too long to be read as a float is too large as well.
    size = parse_size(text, thing="GPU memory") if len(text) <= _SHOWN_TEXT else sys.maxsize
    if size > _LARGEST_CARD:
        raise UserError(
            f"GPU memory is {_short(text)}: no card has more than {format_bytes(_LARGEST_CARD)}; "
            f"several cards are written 4x24GB"
        )
    label = f"{size / GIB:g} GB" if size >= GIB else f"{size / MIB:g} MB"
    return Gpu(
        id=label.replace(" ", "").lower(),
        name=f"{label} card",
        vendor="unknown",
        arch="",
        memory=size,
        memory_is_reported=False,
    )


def find(name: str) -> Gpu:
    """The card called `name`. Raises UserError where none is, or where several are."""
    candidates = _index().get(_normalise(name), ())
    if not candidates:
        raise _unknown(name)
    sizes = {gpu.memory for gpu in candidates}
    if len(candidates) > 1 and len(sizes) > 1:
        choices = ", ".join(f"{gpu.id} ({format_bytes(gpu.memory)})" for gpu in candidates)
        raise UserError(f"GPU {_short(name)} can be several cards: say which of {choices}")
    return candidates[0]


def _unknown(name: str) -> UnknownName:
    hint = "`vramplan gpus` lists them; a size alone works too, such as 24GB"
    shown = name if len(name) <= _SHOWN_TEXT else f"{name[:_SHOWN_TEXT]}..."
    closest = nearest_gpu(shown)
    return UnknownName("GPU", shown, [gpu.id for gpu in all_gpus()], hint=hint, closest=closest)


def nearest_gpu(text: str) -> str | None:
    """The id of the card whose name or alias looks most like `text`, or None."""
    wanted, index = _normalise(text), _index()
    # Swapped digits ("4900") look no nearer to difflib than wrong ones.
    swapped = (key for key in index if sorted(key) == sorted(wanted))
    # "4090 16GB", "RTX 4090 Ti": the card is clear, what follows it does not exist.
    beginnings = (key for key in index if len(key) > 2 and wanted.startswith(key))
    key = next(swapped, None) or max(beginnings, key=len, default=None) or nearest(wanted, index)
    return None if key is None else index[key][0].id


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]}...")


def search(query: str) -> list[Gpu]:
    """The cards that have every word of `query` in their id, name, aliases or architecture; a size
    ("24GB") matches the size as sold. An empty query matches all."""
    words = _SPELLED_SIZE.sub(r"\1gb", query.casefold()).split()
    return [
        gpu
        for entry, gpu in zip(_table()["gpu"], all_gpus(), strict=True)
        if all(_matches(word, entry, gpu) for word in words)
    ]


def _matches(word: str, entry: Mapping[str, Any], gpu: Gpu) -> bool:
    if size := re.fullmatch(r"(\d+)\s*(?:g|gb|gib)", word):
        return bool(int(size[1]) == entry["sold_gb"])
    architecture = _table()["architectures"][gpu.arch]["name"]
    texts = (gpu.id, gpu.name, gpu.vendor, gpu.arch, architecture, *entry.get("aliases", ()))
    wanted = _normalise(word) or word
    return any(word in text.casefold() or wanted in _normalise(text) for text in texts)


# --- what a card can't do -------------------------------------------------------------------


def warnings_for(gpu: Gpu, *, uses_bf16: bool, attention: str) -> list[str]:
    """What of a run this card can't do, or not well: a sentence each, with what to use instead.

    `attention` is transformers' attn_implementation.
    """
    warnings = []
    kind = f"{gpu.name} ({arch_name(gpu)})" if gpu.arch else gpu.name
    if uses_bf16 and not gpu.supports_bf16:
        warnings.append(
            f"{kind} has no bf16 in hardware: PyTorch emulates it, and slowly. Use "
            f"mixed precision fp16, with fp32 weights (or fp16 weights and fp32 LoRA adapters)."
        )
    if attention == "flash_attention_2":
        if not gpu.supports_flash_attention_2:
            warnings.append(
                f"{kind} can't run flash_attention_2: flash-attn needs compute capability 8.0 "
                f"(Ampere) or newer. Use sdpa, whose memory-efficient kernel is linear in the "
                f"sequence too."
            )
        elif gpu.arch == "blackwell":
            warnings.append(
                f"{kind} runs flash_attention_2 only with flash-attn 2.7.3 or newer built with "
                f"CUDA 12.8 or newer. sdpa needs nothing built, and takes the same memory."
            )
    return warnings


def arch_name(gpu: Gpu) -> str:
    """The architecture for a person: "Ada Lovelace"; `gpu.arch` itself where it is not in the
    table."""
    known = _table()["architectures"].get(gpu.arch) if gpu.arch else None
    return gpu.arch if known is None else str(known["name"])


def gpu_from_driver(
    name: str, *, memory: int, usable: int | None, compute_capability: tuple[int, int]
) -> Gpu:
    """The card that a driver describes: the catalogue's, with the memory that this very card has
    (bytes), or, where the catalogue lacks it, one with neither rates nor link."""
    known = gpu_by_device_name(name, memory)
    if known is not None:
        return replace(known, memory=memory, usable=usable, memory_is_reported=True)
    # Both begin with Ampere: CUDA C++ programming guide, "Compute Capabilities" (bf16), and
    # flash-attn's csrc/flash_attn/flash_api.cpp.
    modern = compute_capability >= (8, 0)
    return Gpu(
        id=re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-"),
        name=name,
        vendor="nvidia",
        arch=_arch(compute_capability),
        memory=memory,
        usable=usable,
        compute_capability=".".join(map(str, compute_capability)),
        supports_bf16=modern,
        supports_flash_attention_2=modern,
        source="the driver",
    )


def _arch(compute_capability: tuple[int, int]) -> str:
    """CUDA GPUs by compute capability: https://developer.nvidia.com/cuda-gpus."""
    major, minor = compute_capability
    if major in (7, 8):
        newer = {7: ("volta", "turing", 5), 8: ("ampere", "ada", 9)}[major]
        return newer[1] if minor >= newer[2] else newer[0]
    return {9: "hopper", 10: "blackwell", 11: "blackwell", 12: "blackwell"}.get(
        major, "" if major > 9 else "older than Volta"
    )
