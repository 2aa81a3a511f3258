"""The NVIDIA cards in this machine, as its driver sees them (NVML, through nvidia-ml-py).

Nothing of CUDA is initialised: looking costs no GPU memory. A machine without a card is normal:
`find_gpus` says so by NoGpu, whose message is a plain sentence; `gpus_here` never raises it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from vramplan.errors import VramplanError
from vramplan.hardware.catalogue import gpu_from_driver
from vramplan.hardware.gpu import Gpu, GpuProcess, Gpus


class NoGpu(VramplanError):
    """This machine has no NVIDIA card that could be used. The message is a plain sentence."""


class NoDriver(NoGpu):
    """NVIDIA's driver, or the library that talks to it, is missing or does not answer."""


def gpus_here() -> tuple[list[Gpus], str]:
    """The cards in this machine, and "", or none and the sentence that says why.

    For callers that can go on without a card.
    """
    try:
        return find_gpus(), ""
    except NoGpu as reason:
        return [], str(reason)


def find_gpus() -> list[Gpus]:
    """The cards in this machine, equal ones in one group, in the driver's order.

    `CUDA_VISIBLE_DEVICES` is heeded; its numbers are taken in the driver's order (PCI bus), which
    is CUDA's own wherever all cards are equal. A card in MIG mode is listed by its instances.

    Raises NoDriver (no library, no driver) or NoGpu (no card, or none visible).
    """
    with _session() as nvml:
        try:
            cards = [_read(nvml, *device) for device in _devices(nvml)]
        except nvml.NVMLError as error:
            raise NoDriver(f"NVIDIA's driver does not answer: {error}.") from error
    visible = _visible(cards, os.environ.get("CUDA_VISIBLE_DEVICES"))
    usable = [card for card in visible if card.gpu is not None]
    if not usable:
        raise NoGpu(_why_none(cards, visible))
    return _grouped(usable)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Card:
    index: int
    uuid: str
    name: str
    gpu: Gpu | None
    """None: it has no memory of its own (it shares the CPU's)."""
    free: int
    others: tuple[GpuProcess, ...]


@contextmanager
def _session() -> Iterator[Any]:
    """NVML, initialised, and shut down whatever happens."""
    try:
        import pynvml as nvml
    except ImportError as error:
        raise NoDriver(
            "No NVIDIA GPU was looked for: the package nvidia-ml-py is not installed."
        ) from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoDriver(_why_no_driver(nvml, error)) from error
    try:
        yield nvml
    finally:
        # The answer is already here: a failure to say goodbye must not replace it.
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _why_no_driver(nvml: Any, error: Exception) -> str:
    value = getattr(error, "value", None)
    if value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "This machine has no NVIDIA driver."
    if value == nvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "This machine's NVIDIA driver is not running."
    if value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "The NVIDIA driver was updated while it ran: it works again after a restart."
    return f"NVIDIA's driver does not answer: {error}."


def _devices(nvml: Any) -> Iterator[tuple[int, Any, Any]]:
    """(index, the card's handle, the handle of what a process gets: the card or a MIG instance)."""
    for index in range(nvml.nvmlDeviceGetCount()):
        card = nvml.nvmlDeviceGetHandleByIndex(index)
        instances = list(_mig_instances(nvml, card))
        for device in instances or [card]:
            yield index, card, device


def _mig_instances(nvml: Any, card: Any) -> Iterator[Any]:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(card)
        slots = nvml.nvmlDeviceGetMaxMigDeviceCount(card) if current else 0
    except nvml.NVMLError:  # not supported: no MIG
        return
    for slot in range(slots):
        try:
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, slot)
        except nvml.NVMLError:  # an empty slot
            continue


def _read(nvml: Any, index: int, card: Any, device: Any) -> _Card:
    name = _text(nvml.nvmlDeviceGetName(device))
    try:
        memory, usable, free = _memory(nvml, device)
    except nvml.NVMLError:
        gpu, free = None, 0
    else:
        capability = nvml.nvmlDeviceGetCudaComputeCapability(card)
        gpu = gpu_from_driver(
            name, memory=memory, usable=usable, compute_capability=tuple(capability)
        )
    return _Card(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(device)),
        name=name,
        gpu=gpu,
        free=free,
        others=_others(nvml, device),
    )


def _memory(nvml: Any, device: Any) -> tuple[int, int | None, int]:
    """Bytes: total, usable (total less what the driver keeps, which is what CUDA calls total:
    equal to the byte to cuDeviceTotalMem on an H100 with driver 580), and free."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2)
    except (nvml.NVMLError, AttributeError, TypeError):  # a driver before 510, an old nvidia-ml-py
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        return int(memory.total), None, int(memory.free)
    return int(memory.total), int(memory.total) - int(memory.reserved), int(memory.free)


def _others(nvml: Any, device: Any) -> tuple[GpuProcess, ...]:
    """Other processes that compute on the device. Empty where the driver does not tell: on
    Windows, and in some containers."""
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(device)
    except nvml.NVMLError:
        return ()
    return tuple(
        GpuProcess(pid=process.pid, used=process.usedGpuMemory)
        for process in processes
        if process.pid != os.getpid()
    )


def _text(value: str | bytes) -> str:
    # nvidia-ml-py before 11.515 gave bytes.
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _visible(cards: list[_Card], setting: str | None) -> list[_Card]:
    """The cards that CUDA_VISIBLE_DEVICES leaves, in its order. As in CUDA, the list ends at the
    first entry that names no card; UUIDs may be cut short."""
    if setting is None:
        return cards
    chosen: list[_Card] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            found = [card for card in cards if card.index == int(entry)]
        else:
            found = [card for card in cards if entry and card.uuid.startswith(entry)]
        if not found:
            break
        chosen += [card for card in found if card not in chosen]
    return chosen


def _why_none(cards: list[_Card], visible: list[_Card]) -> str:
    if not cards:
        return "This machine has an NVIDIA driver, but no NVIDIA GPU."
    if not visible:
        return "CUDA_VISIBLE_DEVICES hides every GPU of this machine."
    names = ", ".join(dict.fromkeys(card.name for card in visible))
    return f"{names} has no memory of its own: it shares the CPU's, which is not modelled."


def _grouped(cards: list[_Card]) -> list[Gpus]:
    groups: dict[tuple[str, int], list[_Card]] = {}
    for card in cards:
        assert card.gpu is not None
        groups.setdefault((card.gpu.id, card.gpu.memory), []).append(card)
    return [_group(group) for group in groups.values()]


def _group(cards: list[_Card]) -> Gpus:
    gpu = cards[0].gpu
    assert gpu is not None
    return Gpus(
        gpu=gpu,
        count=len(cards),
        # A run needs the same of each, so the fullest decides.
        free=min(card.free for card in cards),
        others=tuple(process for card in cards for process in card.others),
        indices=tuple(card.index for card in cards),
    )
