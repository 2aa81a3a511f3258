"""A model small enough to count by hand."""

from __future__ import annotations

import pytest

from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import architecture

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def llama() -> Architecture:
    """Llama-3.2-1B's figures."""
    return architecture(LLAMA)
