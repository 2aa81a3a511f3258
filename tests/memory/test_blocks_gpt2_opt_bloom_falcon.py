"""GPT-2, OPT, BLOOM and Falcon: the closed form against a trace of the real code, by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vramplan import LoRA, Recipe

pytestmark = pytest.mark.filterwarnings("ignore")

GPT2: dict[str, Any] = {
    "vocab_size": 1000,
    "n_embd": 512,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 1024,
}
OPT: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "ffn_dim": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
BLOOM: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 512, "n_layer": 3, "n_head": 8}
FALCON: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
DROPOUTS = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2-upcast": {**GPT2, "reorder_and_upcast_attn": True},
    "opt": OPT,
    "opt-projected": {**OPT, "word_embed_proj_dim": 256, "do_layer_norm_before": False},
    "bloom": BLOOM,
    "bloom-dropouts": {**BLOOM, **DROPOUTS, "apply_residual_connection_post_layernorm": True},
    "falcon": {**FALCON, "hidden_size": 448, "num_attention_heads": 7},
    "falcon-grouped": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-old": {
        **FALCON,
        **DROPOUTS,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}
FULL = Recipe(batch_size=2, seq_len=512)
ADAPTED = replace(FULL, lora=LoRA(rank=8, dropout=0.05, target_modules="all-linear"))
RECIPES: dict[str, Recipe] = {
    "full": FULL,
    "one-sequence": replace(FULL, batch_size=1, seq_len=384),
    "eager": replace(FULL, attention="eager"),
    "eager-checkpointing": replace(FULL, attention="eager", gradient_checkpointing=True),
    "eager-lora": replace(ADAPTED, attention="eager"),
    "eager-one-sequence": replace(FULL, batch_size=1, seq_len=384, attention="eager"),
    "eager-nf4": replace(
        ADAPTED, attention="eager", quantization="nf4", gradient_checkpointing=True
    ),
    "fp32": replace(FULL, dtype="fp32", mixed_precision="no"),
    "fp32-fp16": replace(FULL, dtype="fp32", mixed_precision="fp16", gradient_checkpointing=True),
    "lora": ADAPTED,
    "lora-checkpointing": replace(ADAPTED, gradient_checkpointing=True),
    "nf4": replace(ADAPTED, quantization="nf4"),
}
SDPA = ("gpt2", "opt", "opt-projected", "falcon", "falcon-grouped", "falcon-old")
CASES = [
    *[(v, "full") for v in SDPA],
    *[(v, "eager-checkpointing") for v in VARIANTS],
    *[("bloom", r) for r in ("eager-lora", "eager-one-sequence", "eager-nf4")],
    *[("gpt2", r) for r in ("fp32", "lora-checkpointing", "nf4")],
    *[("opt-projected", r) for r in ("eager", "fp32-fp16", "lora", "nf4")],
    *[("falcon", r) for r in ("one-sequence", "nf4")],
    ("falcon-grouped", "one-sequence"),
    ("falcon-old", "fp32-fp16"),
]


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_closed_form_is_the_trace(
    variant: str, name: str, agrees_with_trace: Callable[[dict[str, Any], Recipe], None]
) -> None:
    config = {"model_type": variant.partition("-")[0], **VARIANTS[variant]}
    agrees_with_trace(config, RECIPES[name])
