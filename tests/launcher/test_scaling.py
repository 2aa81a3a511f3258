"""Deep models from shallow ones: as exact as tracing every layer, and really from shallow ones."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace.scaling import run_deep
from vramplan_launcher.trace.steps import trace

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "vocab_size": 500,
    "d_model": 64,
    "d_ff": 128,
    "num_layers": 9,
    "num_heads": 4,
    "d_kv": 16,
    "decoder_start_token_id": 0,
}
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "text_config": LLAMA,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
    "image_token_index": 490,
}
RECIPE = {"batch_size": 2, "seq_len": 64}


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (LLAMA, {}),
        (LLAMA, {"lora": {"rank": 4}, "gradient_checkpointing": True}),
        (LLAMA, {"optimizer": "adamw_torch"}),
        (T5, {}),
        (LLAVA, {"gradient_checkpointing": True}),
    ],
    ids=["llama", "llama, adapted", "llama, foreach", "encoder-decoder", "vision-language"],
)
def test_scaled_is_traced(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    deep = run_deep(config, {**RECIPE, **recipe})
    assert deep.layers is not None, "every layer was traced"
    every = trace(config, {**RECIPE, **recipe})
    assert deep.trace.parameters == every.parameters
    assert deep.trace.base_parameters == every.base_parameters
    found = [(p.name, p.start, p.end, p.peak) for p in deep.trace.phases]
    assert found == [(p.name, p.start, p.end, p.peak) for p in every.phases]
