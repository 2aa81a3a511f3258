"""Llama and its kin: the parameters that are described, against those that transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vramplan.errors import ConfigError
from vramplan.models.hf_config import architecture

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "olmo",
    "olmo2",
    "stablelm",
    "starcoder2",
    "cohere",
    "glm",
    "glm4",
    "phi3",
]
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2},
    "mistral-wide-heads": {"head_dim": 32, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "attention_bias": True},
    "smollm3": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2, "mlp_bias": True},
    "olmo": {"clip_qkv": 8.0},
    "olmo2": {"num_key_value_heads": 2},
    "stablelm": {"num_key_value_heads": 4, "use_qkv_bias": True},
    "stablelm-parallel": {
        "num_key_value_heads": 2,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "starcoder2": {"num_key_value_heads": 2},
    "starcoder2-no-biases": {"num_key_value_heads": 2, "use_bias": False},
    "cohere": {"num_key_value_heads": 2},
    "cohere-normed": {"num_key_value_heads": 2, "use_qk_norm": True},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "phi3": {"num_key_value_heads": 2},
}


def config_of(variant: str) -> dict[str, Any]:
    return {"model_type": variant.partition("-")[0], **SIZES, **VARIANTS[variant]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_model(
    variant: str, same_names: Callable[[dict[str, Any]], None]
) -> None:
    same_names(config_of(variant))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_the_class_defaults(family: str) -> None:
    """The config with only its sizes reads as the one that transformers completes."""
    transformers = pytest.importorskip("transformers")
    short = {"model_type": family, **SIZES}
    completed = transformers.AutoConfig.for_model(**short).to_dict()
    assert architecture(short) == architecture(completed)


def test_a_null_window_is_no_window() -> None:
    mistral = {"model_type": "mistral", **SIZES}
    assert architecture(mistral).sliding_window == 4096
    assert architecture({**mistral, "sliding_window": None}).sliding_window is None
    assert architecture({**mistral, "num_key_value_heads": None}).kv_heads == 4
    assert architecture({**mistral, "num_attention_heads": 8, "hidden_size": 64}).kv_heads == 8


def test_windows_of_some_layers() -> None:
    qwen = {"model_type": "qwen2", **SIZES, "num_key_value_heads": 4, "sliding_window": 128}
    assert architecture(qwen).sliding_window is None
    some = architecture({**qwen, "use_sliding_window": True, "max_window_layers": 3})
    assert some.sliding_window == 128
    assert some.layer_kinds == ("full", "full", "full", "sliding", "sliding")
    none = architecture({**qwen, "use_sliding_window": True, "max_window_layers": 5})
    assert none.sliding_window is None
    assert none.layer_kinds == ()


def test_smollm3_leaves_every_fourth_layer_unrotated() -> None:
    kinds = architecture({"model_type": "smollm3", **SIZES}).layer_kinds
    assert kinds == ("full", "full", "full", "full nope", "full")
    window = {"use_sliding_window": True, "sliding_window": 128}
    kinds = architecture({"model_type": "smollm3", **SIZES, **window}).layer_kinds
    assert kinds == ("full", "full", "full", "sliding nope", "full")


def test_the_rotated_part_of_a_head() -> None:
    """Heads of 16: a quarter is 4, a half 8, three quarters 12."""
    part = {f: architecture({"model_type": f, **SIZES}).rotary_dim for f in ("stablelm", "llama")}
    assert part == {"stablelm": 4, "llama": 16}
    assert architecture(config_of("glm4")).rotary_dim == 8
    phi = {"model_type": "phi3", **SIZES, "partial_rotary_factor": 0.75}
    assert architecture(phi).rotary_dim == 12


def test_a_malformed_list_of_layers_is_named() -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        architecture({"model_type": "qwen3", **SIZES, "layer_types": ["full_attention"]})
    with pytest.raises(ConfigError, match="no_rope_layers"):
        architecture({"model_type": "smollm3", **SIZES, "no_rope_layers": [1, 0]})
