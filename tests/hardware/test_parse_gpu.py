"""The names that people give cards: ids, names as sold, counts, bare sizes."""

from __future__ import annotations

import pytest

from vramplan.errors import InvalidValue, UnknownName, UserError
from vramplan.hardware.catalogue import parse_gpu


@pytest.mark.parametrize(
    ("text", "id", "count"),
    [
        ("rtx-4090", "rtx-4090", 1),
        ("RTX 4090", "rtx-4090", 1),
        ("rtx4090", "rtx-4090", 1),
        ("4090", "rtx-4090", 1),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 1),
        ("GeForceRTX4090 24GB", "rtx-4090", 1),
        ("4xA100-80GB", "a100-80gb", 4),
        ("4 x a100 80 gb", "a100-80gb", 4),
        ("8x H100-80GB", "h100-80gb", 8),
        ("H100", "h100-80gb", 1),
        ("h100 pcie", "h100-80gb-pcie", 1),
        ("a100-sxm4-40gb", "a100-40gb", 1),
        ("2*T4", "t4", 2),
        ("2×t4 16GB", "t4", 2),
        ("RTX 4090 x 2", "rtx-4090", 2),
        ("MI300X", "mi300x", 1),
        ("8xMI300X", "mi300x", 8),
        ("4x4090", "rtx-4090", 4),
        ("A6000", "rtx-a6000", 1),
        ("rtx 3060 ti", "rtx-3060-ti", 1),
        ("  l4  ", "l4", 1),
    ],
)
def test_names(text: str, id: str, count: int) -> None:
    gpus = parse_gpu(text)
    assert (gpus.gpu.id, gpus.count, gpus.nominal, gpus.free) == (id, count, False, None)


@pytest.mark.parametrize(
    ("text", "memory", "count", "name"),
    [
        ("24GB", 24 * 2**30, 1, "24 GB card"),
        ("24GiB", 24 * 2**30, 1, "24 GB card"),
        ("24 gb", 24 * 2**30, 1, "24 GB card"),
        ("24G", 24 * 2**30, 1, "24 GB card"),
        ("4x24GB", 4 * 6 * 2**30, 4, "24 GB card"),
        ("24GB x 2", 24 * 2**30, 2, "24 GB card"),
        ("1.5GB", 3 * 2**29, 1, "1.5 GB card"),
        ("512MiB", 2**29, 1, "512 MB card"),
    ],
)
def test_a_bare_size_is_binary_and_says_nothing_else(
    text: str, memory: int, count: int, name: str
) -> None:
    gpus = parse_gpu(text)
    assert gpus.nominal
    assert (gpus.gpu.memory, gpus.gpu.capacity, gpus.count) == (memory, memory, count)
    assert gpus.gpu.name == name
    assert gpus.gpu.usable is gpus.gpu.bandwidth is gpus.gpu.fp16 is gpus.gpu.fp32 is None
    assert not gpus.gpu.memory_is_reported


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("A100", ["a100-40gb (40.0 GiB)", "a100-80gb (80.0 GiB)"]),
        ("4x V100", ["v100-16gb (16.0 GiB)", "v100-32gb (32.0 GiB)"]),
        ("RTX 3080", ["rtx-3080-10gb", "rtx-3080-12gb"]),
        ("rtx 6000", ["quadro-rtx-6000", "rtx-6000-ada", "rtx-pro-6000"]),
    ],
)
def test_a_name_of_cards_with_different_memory_is_refused(text: str, choices: list[str]) -> None:
    with pytest.raises(UserError, match="can be several cards") as caught:
        parse_gpu(text)
    for choice in choices:
        assert choice in str(caught.value)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("rtx 4900", "rtx-4090"),
        ("rtx 4090ti", "rtx-4090"),
        ("h10", "h100-80gb"),
        ("4090 16GB", "rtx-4090"),
        ("A100-60GB", "a100-40gb"),
    ],
)
def test_an_unknown_name_gets_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse_gpu(text)
    assert caught.value.nearest == nearest
    assert f"unknown GPU {text!r}" in str(caught.value)
    assert "vramplan gpus" in str(caught.value)


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "100001", "9" * 5000, "٣"])
def test_a_wrong_count(count: str) -> None:
    with pytest.raises(UserError, match="whole number from 1") as caught:
        parse_gpu(f"{count}xA100-80GB")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", ["0GB", "-24GB", "0.0GB", "24,5GB"])
def test_a_wrong_size(size: str) -> None:
    with pytest.raises(InvalidValue, match="GPU memory"):
        parse_gpu(size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no GPU named"),
        ("   ", "no GPU named"),
        ("24", "has no unit: a size is written like 24GB"),
        ("24000GB", "no card has more than 2.0 TiB"),
        ("9" * 500 + "GB", "no card has more than 2.0 TiB"),
        ("9" * 500, "has no unit"),
        ("x" * 5000, "unknown GPU"),
        ("24QB", "unknown GPU"),
        ("gpu\x00\x1b[31m", "unknown GPU"),
        ("2x", "unknown GPU"),
        ("1xx24GB", "unknown GPU"),
    ],
)
def test_absurd_text(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_gpu(text)
    assert len(str(caught.value)) < 300
    assert "\x1b" not in str(caught.value)
