"""A small Llama, and what a traced step of it keeps: shared by the tests of the trace."""

from __future__ import annotations

from typing import Any

from vramplan_launcher.trace import trace

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {"batch_size": 2, "seq_len": 64}


def steps(config: dict[str, Any], recipe: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A traced step's phases with the storages that were live at each peak and end."""
    return trace(config, {**SMALL, **recipe}, steps=1, watch_peak=True, **options).step(1)


def kept_by(phase: Any, op: str) -> list[int]:
    """Bytes of what an operation made and a phase's end still has."""
    return [s.size for s in phase.end_storages if op in s.op]
