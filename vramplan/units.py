"""Bytes and counts: how they are written, and how they are read from a person.

Inside vramplan a size is an integer of bytes. GiB appear only when a person is shown something.
"""

from __future__ import annotations

import re

from vramplan.errors import InvalidValue

KIB = 2**10
MIB = 2**20
GIB = 2**30
TIB = 2**40

_UNITS = (
    *(("EiB", 2**60), ("PiB", 2**50), ("TiB", TIB)),
    *(("GiB", GIB), ("MiB", MIB), ("KiB", KIB)),
)
_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?\s*", re.IGNORECASE | re.ASCII)
_COUNT = re.compile(r"\s*(\d[\d_]*)\s*([KM]?)\s*", re.IGNORECASE | re.ASCII)


def format_bytes(size: int, *, digits: int = 1, signed: bool = False) -> str:
    """`size` bytes for a person: "12.3 GiB", "640.0 MiB", "17 B"; `signed` shows a plus as well.

    The unit is the largest in which the number is at least 1, so that no figure reads "0.0".
    """
    sign = "-" if size < 0 else "+" if signed and size > 0 else ""
    magnitude = abs(size)
    for suffix, unit in _UNITS:
        # Rounding can lift 1023.96 MiB to "1024.0 MiB": compare what would be printed.
        if magnitude >= KIB and round(magnitude / unit, digits) >= 1:
            return f"{sign}{magnitude / unit:.{digits}f} {suffix}"
    return f"{sign}{magnitude} B"


def parse_size(text: str, *, thing: str = "size") -> int:
    """The bytes that `text` means: "24GB", "24 GiB", "24G", "24576MiB", "1.5T", "1024B".

    GB and GiB are both 2^30: memory is sold in binary sizes, whatever the label says.
    A bare number has no unit, and is refused.

    Raises InvalidValue, which names `thing`.
    """
    match = _SIZE.fullmatch(text)
    # "24" has no unit, and "24iB" half of one.
    if match is None or (not match[2] and (match[3] or "IB").upper() == "IB"):
        raise InvalidValue(thing, text, "a number and its unit, such as 24GB or 512MiB")
    size = round(float(match[1]) * _SUFFIXES[match[2].upper()])
    if size == 0:
        raise InvalidValue(thing, text, "more than zero")
    return size


def parse_count(text: str, *, thing: str = "count") -> int:
    """The count that `text` means: "2048", "1_000", "8k" (8 × 1024, as context lengths are said).

    Raises InvalidValue, which names `thing`.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise InvalidValue(thing, text, "a whole number, such as 2048 or 2k (2 × 1024)")
    return int(match[1].replace("_", "")) * _SUFFIXES[match[2].upper()]


def format_count(count: int) -> str:
    """A count of parameters for a person: "8.03B", "124M", "960"."""
    for suffix, unit in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        # Three figures; rounding can lift 999.9M to "1000M", which is "1.00B".
        if count / unit >= 0.9995:
            return f"{count / unit:.{2 if count < 99.5 * unit else 0}f}{suffix}"
    return str(count)
