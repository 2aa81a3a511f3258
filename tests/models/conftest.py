"""Fixtures: what transformers builds; what may reach for the network or the user's own cache."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from vramplan.models.hf_config import architecture
from vramplan.models.tensors import inventory

# Everything that moves the cache or keeps the Hub away, so that no test sees the user's own.
VARIABLES = ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"]
VARIABLES += ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that touches the network, even where its error is swallowed."""
    touched: list[object] = []

    def refuse(*args: object, **kwargs: object) -> None:
        touched.append(args)
        raise AssertionError(f"the network was touched: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert touched == []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty working folder, and none of the user's variables."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", constants.DEFAULT_ETAG_TIMEOUT)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hf" / "hub"


@pytest.fixture
def same_names() -> Callable[[dict[str, Any]], None]:
    """Holds names and shapes that are described of a config to those that transformers builds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def hold(config: dict[str, Any]) -> None:
        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config)
            )
        described = inventory(architecture(config))
        weights = {n: t.shape for t in described if t.role != "buffer" for n in t.names()}
        assert weights == {n: tuple(p.shape) for n, p in built.named_parameters()}
        first = {
            next(t.names()): t.numel for t in described if t.role == "linear" and 0 in t.layers
        }
        built_first = [p.numel() for n, p in built.named_parameters() if n in first]
        assert list(first.values()) == built_first  # their order: optimizers step by it
        buffers = {n: t.numel for t in described if t.role == "buffer" for n in t.names()}
        assert buffers == {n: b.numel() for n, b in built.named_buffers()}

    return hold
