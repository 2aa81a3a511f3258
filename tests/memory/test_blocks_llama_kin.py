"""Llama and its kin: the closed form against a trace of the real code, by phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vramplan import LoRA, Recipe

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DROPOUTS = {"attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 256},
    "qwen2": {},
    "qwen2-window": {
        "use_sliding_window": True,
        "sliding_window": 256,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 128},
    "smollm3": {"num_hidden_layers": 5},
    "granite": {"attention_dropout": 0.1},
    "olmo": {"num_key_value_heads": 8},
    "olmo-clipped": {"clip_qkv": 8.0},
    "olmo2": {"num_key_value_heads": 8},
    "stablelm": {"num_key_value_heads": 8, "use_qkv_bias": True},
    "stablelm-parallel": {
        "use_parallel_residual": True,
        "qk_layernorm": True,
        "hidden_dropout": 0.1,
    },
    "starcoder2": DROPOUTS,
    "cohere": {},
    "cohere-normed": {"use_qk_norm": True},
    "glm": {"head_dim": 64},
    "glm4": {"head_dim": 64},
    "phi3": {"num_key_value_heads": 8},
    "phi3-partial": {"partial_rotary_factor": 0.75, "resid_pdrop": 0.1},
}
RECIPES: dict[str, Recipe] = {
    "full": Recipe(batch_size=2, seq_len=512),
    "eager-checkpointing": Recipe(
        batch_size=2, seq_len=512, attention="eager", gradient_checkpointing=True
    ),
    "lora": Recipe(
        batch_size=2, seq_len=512, lora=LoRA(rank=8, dropout=0.05, target_modules="all-linear")
    ),
    "fp32": Recipe(batch_size=1, seq_len=512, dtype="fp32", mixed_precision="no"),
    "nf4-checkpointing": Recipe(
        batch_size=2,
        seq_len=512,
        quantization="nf4",
        gradient_checkpointing=True,
        lora=LoRA(rank=8, dropout=0.05, target_modules="all-linear"),
    ),
}
CHECKPOINTED = ["llama", "mistral", "qwen2-window", "qwen3", "smollm3", "olmo2", "starcoder2"]
CHECKPOINTED += ["stablelm-parallel", "cohere-normed", "glm4", "phi3-partial"]
CASES = [(variant, "full") for variant in VARIANTS]
CASES += [(variant, "eager-checkpointing") for variant in CHECKPOINTED]
CASES += [
    ("mistral", "lora"),
    ("qwen2-window", "lora"),
    ("granite", "nf4-checkpointing"),
    ("olmo2", "lora"),
    ("stablelm", "fp32"),
    ("starcoder2", "lora"),
    ("starcoder2", "fp32"),
    ("cohere", "nf4-checkpointing"),
    ("phi3-partial", "lora"),
    ("glm4", "nf4-checkpointing"),
]


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_closed_form_is_the_trace(
    variant: str, name: str, agrees_with_trace: Callable[[dict[str, Any], Recipe], None]
) -> None:
    config = {"model_type": variant.partition("-")[0], **SIZES, **VARIANTS[variant]}
    agrees_with_trace(config, RECIPES[name])
