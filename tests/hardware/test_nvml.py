"""What the driver says, from a fake driver."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vramplan.hardware.gpu import GpuProcess
from vramplan.hardware.nvml import NoDriver, NoGpu, find_gpus, gpus_here
from vramplan.units import GIB, MIB


class FakeError(Exception):
    def __init__(self, value: int = 999) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


@dataclass(eq=False)
class Device:
    name: str | bytes = "NVIDIA GeForce RTX 4090"
    total: int = 24_564 * MIB
    reserved: int = 483 * MIB
    free: int = 24_000 * MIB
    capability: tuple[int, int] = (8, 9)
    processes: list[tuple[int, int | None]] | None = field(default_factory=list)
    uuid: str = "GPU-0"
    shares_memory: bool = False
    instances: list[Device | None] | None = None
    """MIG: None without it, [] with it switched off; a None within is an empty slot."""


class FakeNvml(ModuleType):
    """The part of pynvml that is used, over a list of Devices."""

    NVMLError = FakeError
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
    nvmlMemory_v2 = 0x02000028  # noqa: N815

    def __init__(self, devices: list[Device], init_error: int | None = None) -> None:
        super().__init__("pynvml")
        self.devices = devices
        self.init_error = init_error
        self.calls: list[str] = []
        self.knows_v2 = True
        self.shutdown_fails = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.calls.append("init")
        if self.init_error is not None:
            raise FakeError(self.init_error)

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls.append("shutdown")
        if self.shutdown_fails:
            raise FakeError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:  # noqa: N802
        return self.devices[index]

    def nvmlDeviceGetName(self, device: Device) -> str | bytes:  # noqa: N802
        return device.name

    def nvmlDeviceGetUUID(self, device: Device) -> str:  # noqa: N802
        return device.uuid

    def nvmlDeviceGetCudaComputeCapability(self, device: Device) -> tuple[int, int]:  # noqa: N802
        return device.capability

    def nvmlDeviceGetMemoryInfo(  # noqa: N802
        self, device: Device, version: int | None = None
    ) -> Any:
        if device.shares_memory or (version is not None and not self.knows_v2):
            raise FakeError(3)
        memory = SimpleNamespace(total=device.total, free=device.free)
        if version == self.nvmlMemory_v2:
            memory.reserved = device.reserved
        return memory

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> list[Any]:  # noqa: N802
        if device.processes is None:
            raise FakeError(4)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in device.processes]

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:  # noqa: N802
        if device.instances is None:
            raise FakeError(3)
        return [int(bool(device.instances)), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:  # noqa: N802
        return len(device.instances or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, slot: int) -> Device:  # noqa: N802
        instance = (device.instances or [])[slot]
        if instance is None:
            raise FakeError(6)
        return instance


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*devices: Device, init_error: int | None = None) -> FakeNvml:
        fake = FakeNvml(list(devices), init_error)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


def test_one_card(driver: Any) -> None:
    fake = driver(Device())
    (gpus,) = find_gpus()
    assert gpus.gpu.id == "rtx-4090"
    assert gpus.gpu.memory == 24_564 * MIB
    # What CUDA calls the total is the driver's total without what the driver keeps.
    assert gpus.gpu.capacity == gpus.gpu.usable == (24_564 - 483) * MIB
    assert (gpus.count, gpus.free, gpus.others, gpus.indices) == (1, 24_000 * MIB, (), (0,))
    assert not gpus.nominal
    assert fake.calls == ["init", "shutdown"]


def test_equal_cards_are_one_group_and_the_fullest_decides(driver: Any) -> None:
    driver(Device(free=20 * GIB), Device(free=9 * GIB, processes=[(77, 11 * GIB)]), Device())
    (gpus,) = find_gpus()
    assert (gpus.count, gpus.free, gpus.indices) == (3, 9 * GIB, (0, 1, 2))
    assert gpus.others == (GpuProcess(pid=77, used=11 * GIB),)
    assert str(gpus) == "3 x GeForce RTX 4090"


def test_mixed_cards_are_groups_in_the_drivers_order(driver: Any) -> None:
    t4 = {"name": "Tesla T4", "total": 15_360 * MIB, "capability": (7, 5)}
    driver(Device(**t4), Device(), Device(**t4))
    first, second = find_gpus()
    assert (first.gpu.id, first.count, first.indices) == ("t4", 2, (0, 2))
    assert (second.gpu.id, second.count, second.indices) == ("rtx-4090", 1, (1,))


def test_cards_of_one_name_and_different_memory_are_two_groups(driver: Any) -> None:
    driver(Device(total=24_564 * MIB), Device(total=49_140 * MIB))
    assert [gpus.gpu.memory for gpus in find_gpus()] == [24_564 * MIB, 49_140 * MIB]


def test_a_card_that_the_catalogue_lacks(driver: Any) -> None:
    driver(Device(name="NVIDIA GeForce GTX 1080 Ti", total=11_264 * MIB, capability=(6, 1)))
    (gpus,) = find_gpus()
    assert gpus.gpu.name == "NVIDIA GeForce GTX 1080 Ti"
    assert gpus.gpu.memory == 11_264 * MIB
    assert not gpus.gpu.supports_bf16
    assert gpus.gpu.fp16 is None


def test_own_process_is_no_other_and_unknown_use_is_none(driver: Any) -> None:
    driver(Device(processes=[(os.getpid(), GIB), (4242, None)]))
    (gpus,) = find_gpus()
    assert gpus.others == (GpuProcess(pid=4242, used=None),)


def test_processes_that_the_driver_keeps_to_itself(driver: Any) -> None:
    driver(Device(processes=None))
    (gpus,) = find_gpus()
    assert gpus.others == ()


def test_an_old_driver_tells_no_reserved_memory(driver: Any) -> None:
    driver(Device()).knows_v2 = False
    (gpus,) = find_gpus()
    assert (gpus.gpu.memory, gpus.gpu.usable) == (24_564 * MIB, None)


def test_names_in_bytes(driver: Any) -> None:
    driver(Device(name=b"Tesla T4", total=15_360 * MIB))
    assert find_gpus()[0].gpu.id == "t4"


def test_mig_instances_stand_for_their_card(driver: Any) -> None:
    part = Device(name="NVIDIA A100-SXM4-40GB MIG 3g.20gb", total=20 * GIB, free=19 * GIB)
    card = Device(name="NVIDIA A100-SXM4-40GB", capability=(8, 0), instances=[part, None, part])
    driver(card)
    (gpus,) = find_gpus()
    assert gpus.gpu.name == "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    assert (gpus.gpu.memory, gpus.count, gpus.free) == (20 * GIB, 2, 19 * GIB)
    assert gpus.gpu.arch == "ampere"


# --- none -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (12, "This machine has no NVIDIA driver."),
        (9, "This machine's NVIDIA driver is not running."),
        (18, "The NVIDIA driver was updated while it ran: it works again after a restart."),
        (999, "NVIDIA's driver does not answer: NVML error 999."),
    ],
)
def test_no_driver(driver: Any, code: int, sentence: str) -> None:
    fake = driver(Device(), init_error=code)
    with pytest.raises(NoDriver) as caught:
        find_gpus()
    assert str(caught.value) == sentence
    assert gpus_here() == ([], sentence)
    assert "shutdown" not in fake.calls


def test_the_real_library_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml")

    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert gpus_here() == ([], "This machine has no NVIDIA driver.")


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoDriver, match="nvidia-ml-py is not installed"):
        find_gpus()


def test_a_driver_without_cards(driver: Any) -> None:
    fake = driver()
    with pytest.raises(NoGpu, match="an NVIDIA driver, but no NVIDIA GPU") as caught:
        find_gpus()
    assert not isinstance(caught.value, NoDriver)
    assert fake.calls == ["init", "shutdown"]


def test_a_card_that_fails_half_way_is_an_answer_and_nvml_is_shut_down(
    driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = driver(Device())

    def lost(index: int) -> Device:
        raise FakeError(15)

    monkeypatch.setattr(fake, "nvmlDeviceGetHandleByIndex", lost)
    with pytest.raises(NoDriver, match="does not answer: NVML error 15"):
        find_gpus()
    assert fake.calls == ["init", "shutdown"]


def test_a_failing_shutdown_does_not_lose_the_answer(driver: Any) -> None:
    driver(Device()).shutdown_fails = True
    assert find_gpus()[0].count == 1


def test_a_card_with_the_cpus_memory(driver: Any) -> None:
    driver(Device(name="NVIDIA GB10", shares_memory=True))
    with pytest.raises(NoGpu, match="NVIDIA GB10 has no memory of its own"):
        find_gpus()


# --- CUDA_VISIBLE_DEVICES -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        ("1", (1,)),
        ("2,0", (2, 0)),
        (" 0 , 1 ", (0, 1)),
        ("0,7,1", (0,)),  # as CUDA reads it: the list ends at the first that does not exist
        ("GPU-b", (1,)),
        ("1,1", (1,)),
    ],
)
def test_visible_devices(
    driver: Any, monkeypatch: pytest.MonkeyPatch, setting: str, indices: tuple[int, ...]
) -> None:
    driver(Device(uuid="GPU-aaa"), Device(uuid="GPU-bbb"), Device(uuid="GPU-ccc"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    (gpus,) = find_gpus()
    assert gpus.indices == indices


@pytest.mark.parametrize("setting", ["", "-1", "NoDevFiles"])
def test_all_hidden(driver: Any, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    driver(Device())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    with pytest.raises(NoGpu, match="CUDA_VISIBLE_DEVICES hides every GPU"):
        find_gpus()
