"""No test leaves this machine, or depends on what its user has cached or set."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Before anything imports huggingface_hub, which reads these once.
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="vramplan-tests-")
# Runs that were launched here, and what this machine's cards were measured to need.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="vramplan-tests-")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_COLOR"] = "1"
# DeepSpeed's ops are compiled by ninja, which is installed beside this Python.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
for _name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PYTORCH_CUDA_ALLOC_CONF"):
    os.environ.pop(_name, None)

_LOCAL = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere but this machine fails as it does with the cable pulled."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in _LOCAL:
            raise OSError(101, f"Network is unreachable (tests stay offline): {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
