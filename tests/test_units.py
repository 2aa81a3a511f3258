from __future__ import annotations

import pytest

from vramplan.errors import InvalidValue
from vramplan.units import GIB, KIB, MIB, TIB, format_bytes, format_count, parse_count, parse_size


def test_units() -> None:
    assert (KIB, MIB, GIB, TIB) == (1024, 1_048_576, 1_073_741_824, 1_099_511_627_776)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12 * GIB + 300 * MIB, "12.3 GiB"),  # 300 / 1024 = 0.293
        (640 * MIB, "640.0 MiB"),
        (2 * TIB, "2.0 TiB"),
        (1536 * TIB, "1.5 PiB"),
        (2**61, "2.0 EiB"),
        (-5 * GIB, "-5.0 GiB"),
        (GIB - 1, "1.0 GiB"),  # rounds to 1024.0 MiB, which nobody writes
    ],
)
def test_format_bytes(size: int, shown: str) -> None:
    assert format_bytes(size) == shown


def test_format_bytes_digits_and_sign() -> None:
    assert format_bytes(12 * GIB + 256 * MIB, digits=2) == "12.25 GiB"
    assert format_bytes(3 * GIB, digits=0) == "3 GiB"
    assert format_bytes(GIB, signed=True) == "+1.0 GiB"
    assert format_bytes(-GIB, signed=True) == "-1.0 GiB"
    assert format_bytes(0, signed=True) == "0 B"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 2**30),  # memory is sold in binary sizes
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        (" 24 gb ", 24 * 2**30),
        ("1.5T", 3 * 2**39),
        ("512MiB", 512 * 2**20),
        ("0.5GB", 2**29),
        ("1024B", 1024),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["24", "", "GB", "-24GB", "24 GBs", "24iB", "1e3GB", "2,5GB", "٢GB"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(InvalidValue, match="^card is .* a number and its unit, such as 24GB"):
        parse_size(text, thing="card")


@pytest.mark.parametrize("text", ["0GB", "0.0000000001GB"])
def test_parse_size_refuses_nothing(text: str) -> None:
    with pytest.raises(InvalidValue, match="more than zero"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "count"), [("2048", 2048), ("1_000", 1000), ("8k", 8 * 1024), ("1M", 1024 * 1024)]
)
def test_parse_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5k", "8kb", "_1"])
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(InvalidValue, match="^seq_len is .* a whole number"):
        parse_count(text, thing="seq_len")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (8_030_261_248, "8.03B"),
        (124_439_808, "124M"),
        (671_026_419_200, "671B"),
        (960, "960"),
        (0, "0"),
        (999_999_999, "1.00B"),  # not "1000M"
        (1_500, "1.50K"),
    ],
)
def test_format_count(count: int, shown: str) -> None:
    assert format_count(count) == shown
