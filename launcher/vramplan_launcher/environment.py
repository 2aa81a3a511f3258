"""What a run ran on: versions, card, driver."""

from __future__ import annotations

import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
    "vramplan",
)


def environment(device: int | None) -> dict[str, Any]:
    """Versions, and of the device its name, size and driver. Sizes are bytes."""
    import torch

    found: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    found |= {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "alloc_conf": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }
    if device is not None:
        card = torch.cuda.get_device_properties(device)
        found |= {
            "device": card.name,
            "device_memory": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "driver": _driver(),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        said = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no NVML: torch names the card all the same
        return None
    return said.decode() if isinstance(said, bytes) else str(said)
