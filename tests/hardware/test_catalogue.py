"""The table of cards: what it says, what a driver adds, what a search finds."""

from __future__ import annotations

import re

import pytest

from vramplan.hardware.catalogue import (
    Gpu,
    all_gpus,
    find,
    gpu_by_device_name,
    gpu_from_driver,
    parse_gpu,
    search,
    warnings_for,
)
from vramplan.units import GIB, MIB

GPUS = all_gpus()
BY_ID = {gpu.id: gpu for gpu in GPUS}


def each(test: object) -> object:
    return pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.id)(test)


# --- the table ------------------------------------------------------------------------------


def test_ids_are_unique_and_enough() -> None:
    assert len(BY_ID) == len(GPUS) >= 50
    assert sum(gpu.vendor == "amd" for gpu in GPUS) >= 4
    assert {gpu.arch for gpu in GPUS if gpu.vendor == "nvidia"} == {
        *("volta", "turing", "ampere", "ada", "hopper", "blackwell")
    }


@each
def test_a_card_is_complete(gpu: Gpu) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", gpu.id)
    assert len(gpu.id) <= 19, "the table of `vramplan gpus` is 80 columns wide"
    assert gpu.source.startswith(("NVIDIA", "AMD"))
    assert gpu.link
    assert gpu.year is not None
    assert (gpu.compute_capability is None) == (gpu.vendor == "amd")


@each
def test_a_card_is_found_by_its_id_and_its_name(gpu: Gpu) -> None:
    assert find(gpu.id) is gpu
    assert find(gpu.name) is gpu
    assert find(f"NVIDIA {gpu.id.upper()}") is gpu


@each
def test_figures_are_in_the_range_of_real_cards(gpu: Gpu) -> None:
    """A slip of a unit or of a digit would leave these ranges."""
    assert 6 * GIB <= gpu.memory <= 288 * GIB
    assert gpu.bandwidth is not None
    assert 200 * 10**9 <= gpu.bandwidth <= 8000 * 10**9
    if gpu.fp32 is not None:
        assert 4 * 10**12 <= gpu.fp32 <= 170 * 10**12
    if gpu.fp16 is not None and gpu.fp32 is not None:
        # 2 (GeForce) to 32 (B300) operations of the matrix units for one of the vector units.
        assert 1.9 < gpu.fp16 / gpu.fp32 < 33


@each
def test_usable_memory_is_a_little_less_than_the_drivers_total(gpu: Gpu) -> None:
    if gpu.usable is None:
        assert gpu.capacity == gpu.memory
    else:
        assert gpu.capacity == gpu.usable
        assert 0.96 < gpu.usable / gpu.memory < 1


@each
def test_reported_memory_is_not_more_than_sold(gpu: Gpu) -> None:
    label = re.search(r"(\d+) ?GB", gpu.name)
    if label:
        assert 0.93 < gpu.memory / (int(label[1]) * GIB) <= 1.0


@each
def test_what_an_architecture_can_do(gpu: Gpu) -> None:
    modern = gpu.arch not in ("volta", "turing")
    assert gpu.supports_bf16 == modern
    assert gpu.supports_flash_attention_2 == modern
    assert gpu.bf16 == (gpu.fp16 if modern else None)
    if gpu.compute_capability is not None:
        assert (float(gpu.compute_capability) >= 8.0) == modern


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("t4", 15_360),
        ("rtx-4090", 24_564),
        ("rtx-3090", 24_576),
        ("a100-80gb", 81_920),
        ("h100-80gb", 81_559),
        ("h200", 143_771),
        ("b200", 183_359),
    ],
)
def test_memory_that_nvidia_smi_reports(name: str, mib: int) -> None:
    assert BY_ID[name].memory == mib * 2**20
    assert BY_ID[name].memory_is_reported


def test_usable_memory_as_measured() -> None:
    # An H100 with driver 580: 81 559 MiB in all, 480 MiB kept by the driver; cuDeviceTotalMem
    # says 85 017 493 504. An H200 the same way: 150 109 880 320, of which the table has whole MiB.
    assert BY_ID["h100-80gb"].usable == (81_559 - 480) * 2**20 == 85_017_493_504
    assert BY_ID["h200"].usable == 150_109_880_320 // 2**20 * 2**20


@pytest.mark.parametrize(
    ("name", "processors", "clock_mhz"),
    # As in NVIDIA's whitepapers: SMs, boost clock.
    [("rtx-2080-ti", 68, 1545), ("rtx-3090", 82, 1695), ("rtx-4090", 128, 2520)],
)
def test_geforce_rate_is_that_with_fp32_accumulation(
    name: str, processors: int, clock_mhz: int
) -> None:
    # 512 operations a clock and SM: half of what these do with fp16 accumulation.
    fp16 = BY_ID[name].fp16
    assert fp16 == pytest.approx(processors * 512 * clock_mhz * 10**6, rel=0.005)


def test_link_speeds_are_of_one_direction() -> None:
    # Vendors state NVLink in both directions together: 600 and 900 GB/s.
    assert BY_ID["a100-80gb"].link_bandwidth == 300 * 10**9
    assert BY_ID["h100-80gb"].link_bandwidth == 450 * 10**9
    # PCIe 4.0: 16 GT/s on 16 lanes, 128 of 130 bits, 8 bits a byte = 31.5 GB/s.
    assert BY_ID["rtx-4090"].link_bandwidth == 16 * 10**9 * 16 * 128 // 130 // 8 == 31_507_692_307
    assert BY_ID["mi250x"].link_bandwidth is None


# --- from the driver ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mib", "id"),
    [
        ("NVIDIA GeForce RTX 4090", 24_564, "rtx-4090"),
        ("GeForce RTX 2080 Ti", 11_264, "rtx-2080-ti"),
        ("NVIDIA TITAN RTX", 24_576, "titan-rtx"),
        ("NVIDIA GeForce RTX 3080", 10_240, "rtx-3080-10gb"),
        ("NVIDIA GeForce RTX 3080", 12_288, "rtx-3080-12gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16_380, "rtx-4060-ti-16gb"),
        ("Tesla T4", 15_360, "t4"),
        ("Tesla V100-SXM2-32GB", 32_768, "v100-32gb"),
        ("Tesla V100-PCIE-16GB", 16_384, "v100-16gb-pcie"),
        ("Quadro RTX 6000", 23_040, "quadro-rtx-6000"),
        ("NVIDIA RTX 6000 Ada Generation", 49_140, "rtx-6000-ada"),
        ("NVIDIA RTX A6000", 49_140, "rtx-a6000"),
        ("NVIDIA RTX A2000 12GB", 12_282, "rtx-a2000-12gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887, "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97_887, "rtx-pro-6000-max-q"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_887, "rtx-pro-6000-server"),
        ("NVIDIA A10G", 23_028, "a10g"),
        ("NVIDIA A100-SXM4-40GB", 40_960, "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", 40_960, "a100-40gb-pcie"),
        ("NVIDIA A100-SXM4-80GB", 81_920, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 81_920, "a100-80gb-pcie"),
        ("NVIDIA H100 80GB HBM3", 81_559, "h100-80gb"),
        ("NVIDIA H100 PCIe", 81_559, "h100-80gb-pcie"),
        ("NVIDIA H100 NVL", 95_830, "h100-nvl"),
        ("NVIDIA H200", 143_771, "h200"),
        ("NVIDIA H200 NVL", 143_771, "h200-nvl"),
        ("NVIDIA GH200 480GB", 97_871, "gh200-96gb"),
        ("NVIDIA L40S", 46_068, "l40s"),
        ("NVIDIA B200", 183_359, "b200"),
        ("NVIDIA B300 SXM6 AC", 275_040, "b300"),
        ("NVIDIA GB200", 189_471, "gb200"),
    ],
)
def test_the_drivers_names(name: str, mib: int, id: str) -> None:
    gpu = gpu_by_device_name(name, mib * MIB)
    assert gpu is not None
    assert gpu.id == id


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GTX 1080"]
)
def test_a_name_like_a_known_one_is_not_taken_for_it(name: str) -> None:
    assert gpu_by_device_name(name, 16 * GIB) is None


def test_a_found_card_has_its_own_memory_and_the_tables_rates() -> None:
    # A card with twice the memory that its kind is sold with.
    gpu = gpu_from_driver(
        "NVIDIA GeForce RTX 4090", memory=48 * GIB, usable=47 * GIB, compute_capability=(8, 9)
    )
    assert (gpu.id, gpu.memory, gpu.capacity) == ("rtx-4090", 48 * GIB, 47 * GIB)
    assert gpu.fp16 == BY_ID["rtx-4090"].fp16


@pytest.mark.parametrize(
    ("capability", "arch", "modern"),
    [
        ((6, 1), "older than Volta", False),
        ((7, 0), "volta", False),
        ((7, 5), "turing", False),
        ((8, 7), "ampere", True),
        ((8, 9), "ada", True),
        ((9, 0), "hopper", True),
        ((10, 3), "blackwell", True),
        ((12, 1), "blackwell", True),
        ((15, 0), "", True),
    ],
)
def test_a_card_that_the_table_lacks(capability: tuple[int, int], arch: str, modern: bool) -> None:
    gpu = gpu_from_driver(
        "NVIDIA Nonesuch 9000 Ti", memory=8 * GIB, usable=None, compute_capability=capability
    )
    assert (gpu.id, gpu.arch) == ("nvidia-nonesuch-9000-ti", arch)
    assert gpu.compute_capability == f"{capability[0]}.{capability[1]}"
    assert (gpu.supports_bf16, gpu.supports_flash_attention_2) == (modern, modern)
    assert gpu.fp16 is gpu.fp32 is gpu.bandwidth is gpu.link_bandwidth is None


# --- search ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("ada 24GB", ["rtx-4090", "rtx-4500-ada", "l4"]),
        ("ada 24 gb", ["rtx-4090", "rtx-4500-ada", "l4"]),
        ("h200", ["h200", "h200-nvl", "gh200-96gb", "gh200-144gb"]),
        ("AMD gfx950", ["mi350x", "mi355x"]),
        ("a100 pcie 80gb", ["a100-80gb-pcie"]),
        ("nonesuch", []),
    ],
)
def test_search(query: str, ids: list[str]) -> None:
    assert [gpu.id for gpu in search(query)] == ids


def test_search_for_nothing_finds_all() -> None:
    assert search("") == list(GPUS)


# --- warnings -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtx-2080-ti", "t4", "v100-32gb", "quadro-rtx-8000"])
def test_old_cards_are_told_what_to_use_instead(name: str) -> None:
    gpu = BY_ID[name]
    bf16, flash = warnings_for(gpu, uses_bf16=True, attention="flash_attention_2")
    assert gpu.name in bf16
    assert "mixed precision fp16" in bf16
    assert gpu.name in flash
    assert "Use sdpa" in flash
    assert warnings_for(gpu, uses_bf16=False, attention="sdpa") == []


@pytest.mark.parametrize("name", ["rtx-3090", "rtx-4090", "h100-80gb", "mi300x"])
def test_newer_cards_can_do_all(name: str) -> None:
    assert warnings_for(BY_ID[name], uses_bf16=True, attention="flash_attention_2") == []


def test_blackwell_needs_a_recent_flash_attn() -> None:
    gpu = BY_ID["rtx-5090"]
    (warning,) = warnings_for(gpu, uses_bf16=True, attention="flash_attention_2")
    assert "CUDA 12.8" in warning
    assert "GeForce RTX 5090 (Blackwell)" in warning
    assert warnings_for(gpu, uses_bf16=True, attention="sdpa") == []


def test_nothing_is_held_against_a_card_that_is_only_a_size() -> None:
    gpu = parse_gpu("24GB").gpu
    assert warnings_for(gpu, uses_bf16=True, attention="flash_attention_2") == []
