"""What a GPU says of a process: torch's counters, and the driver's through NVML."""

from __future__ import annotations

import os
from typing import Any

import torch


class Counters:
    """torch's allocator counters of one device, relative to where the run began. Bytes.

    On a machine without CUDA every figure is None.
    """

    def __init__(self, device: int | None) -> None:
        self.device = device
        self.base = 0
        self.reserved = 0
        """The most that was reserved, over all resets."""
        self.highest = 0
        """The most that was allocated, over all resets and from `base`."""

    @property
    def here(self) -> bool:
        """Whether there is anything to read."""
        return self.device is not None

    def begin(self) -> None:
        """Makes the CUDA context; what is allocated now counts as nothing."""
        if not self.here:
            return
        torch.zeros(1, device=f"cuda:{self.device}")
        self.base = torch.cuda.memory_allocated(self.device)
        self.reset()
        self.reserved = self.highest = 0

    def now(self) -> int | None:
        """Allocated."""
        return torch.cuda.memory_allocated(self.device) - self.base if self.here else None

    def peak(self) -> int | None:
        """The most that was allocated since the last reset."""
        return torch.cuda.max_memory_allocated(self.device) - self.base if self.here else None

    def reset(self) -> None:
        """Waits for the device, takes note of the peaks, and starts them anew."""
        if not self.here:
            return
        torch.cuda.synchronize(self.device)
        self.note()
        torch.cuda.reset_peak_memory_stats(self.device)

    def note(self) -> None:
        """Takes note of the peaks so far."""
        if self.here:
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))
            self.highest = max(self.highest, self.peak() or 0)

    def wait(self) -> None:
        """For the device."""
        if self.here:
            torch.cuda.synchronize(self.device)


def driver_says(device: int | None) -> dict[str, Any]:
    """NVML's figures of a device, in bytes: used in all, and by this process.

    In a container the driver may see other process numbers than this one's: then `process` is
    None, and `only_process` is what the device's one process has, where there is but one.
    """
    if device is None:
        return {}
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = _handle(pynvml, device)
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        used = {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except Exception as error:  # no NVML, an old driver, MIG: a run goes on without
        return {"error": f"{type(error).__name__}: {error}"}
    only = next(iter(used.values())) if len(used) == 1 else None
    return {
        "device_used": int(info.used),
        "device_total": int(info.total),
        "process": used.get(os.getpid()),
        "only_process": only,
    }


def _handle(pynvml: Any, device: int) -> Any:
    """torch's numbers are those of the visible devices; NVML's are the driver's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[device].strip() if device < len(visible) else ""
    if name.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    return pynvml.nvmlDeviceGetHandleByIndex(int(name) if name.isdigit() else device)
