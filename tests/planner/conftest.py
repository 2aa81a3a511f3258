"""Models of the catalogue, read once."""

from __future__ import annotations

import pytest

from vramplan.memory.estimate import resolve
from vramplan.models.architecture import Architecture


@pytest.fixture(scope="session")
def llama_1b() -> Architecture:
    return resolve("meta-llama/Llama-3.2-1B")[1]


@pytest.fixture(scope="session")
def llama_8b() -> Architecture:
    return resolve("meta-llama/Llama-3.1-8B")[1]
