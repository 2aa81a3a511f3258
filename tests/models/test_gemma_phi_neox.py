"""Gemma, Phi, GPT-NeoX and GPT-J: what is read and described, against what transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vramplan.errors import ConfigError
from vramplan.models import catalogue
from vramplan.models.hf_config import architecture

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("gemma", "gemma2", "gemma3_text", "phi", "gpt_neox", "gptj")
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16}
GPTJ = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "rotary_dim": 8,
    "n_positions": 32,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma": {**SIZES, **GEMMA},
    "gemma-untied": {**SIZES, **GEMMA, "tie_word_embeddings": False, "attention_bias": True},
    "gemma2": {**SIZES, **GEMMA},
    "gemma3_text": {**SIZES, **GEMMA},
    "gemma3_text-sliding": {**SIZES, **GEMMA, "num_hidden_layers": 4},
    "gemma3_text-pattern": {**SIZES, **GEMMA, "sliding_window_pattern": 2},
    "phi": SIZES,
    "phi-normed": {**SIZES, "qk_layernorm": True, "num_key_value_heads": 2},
    "gpt_neox": SIZES,
    "gpt_neox-tied": {**SIZES, "tie_word_embeddings": True, "attention_bias": False},
    "gptj": {**GPTJ, **TOKENS},
    "gptj-inner": {**GPTJ, **TOKENS, "n_inner": 96},
}


def config_of(variant: str) -> dict[str, Any]:
    return {"model_type": variant.partition("-")[0], **VARIANTS[variant]}


def figures_of(model_id: str) -> Any:
    checkpoint = catalogue.load(model_id)
    assert checkpoint is not None
    return architecture(checkpoint.config)


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_model(
    variant: str, same_names: Callable[[dict[str, Any]], None]
) -> None:
    same_names(config_of(variant))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_the_class_defaults(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.AutoConfig.for_model(family)
    arch = architecture({"model_type": family})
    assert arch.hidden_size == defaults.hidden_size
    assert arch.layers == defaults.num_hidden_layers
    assert arch.heads == defaults.num_attention_heads
    assert arch.vocab_size == defaults.vocab_size
    assert arch.max_positions == defaults.max_position_embeddings
    assert arch.tied_embeddings is defaults.tie_word_embeddings
    assert arch.kv_heads == getattr(defaults, "num_key_value_heads", arch.heads)
    kinds = [f"{kind}_attention" for kind in arch.layer_kinds]
    assert kinds == getattr(defaults, "layer_types", [])
    assert arch.sliding_window == getattr(defaults, "sliding_window", None)


def test_published_sizes() -> None:
    gemma = figures_of("google/gemma-2b")
    assert (gemma.head_dim, gemma.kv_heads, gemma.rotary_dim) == (256, 1, 256)
    assert figures_of("microsoft/phi-2").rotary_dim == 32  # 0.4 of a head of 80
    assert figures_of("microsoft/phi-2").dropouts.residual == 0.1
    assert figures_of("EleutherAI/gpt-neox-20b").rotary_dim == 24  # 0.25 of 96
    assert figures_of("EleutherAI/gpt-neox-20b").activation == "gelu_fast"
    assert figures_of("EleutherAI/gpt-j-6b").intermediate_size == 4 * 4096


def test_every_sixth_layer_of_gemma3_sees_all_tokens() -> None:
    kinds = figures_of("google/gemma-3-1b-pt").layer_kinds
    assert [i for i, kind in enumerate(kinds) if kind == "full"] == [5, 11, 17, 23]


def test_null_switches_a_soft_cap_off() -> None:
    config = config_of("gemma2")
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    on, off = architecture(config), architecture({**config, **dict.fromkeys(caps)})
    assert (on.attention_softcap, on.logit_softcap) == (True, True)
    assert (off.attention_softcap, off.logit_softcap) == (False, False)


def test_text_model_of_gemma3() -> None:
    text = config_of("gemma3_text")
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 32}}
    assert architecture(whole) == architecture(text)


def test_rotated_part_among_the_rope_parameters() -> None:
    config = {**config_of("gpt_neox"), "rope_parameters": {"partial_rotary_factor": 0.5}}
    assert architecture(config).rotary_dim == 8  # half of 64 // 4


@pytest.mark.parametrize("types", [["full_attention"], ["linear_attention"] * 7, "sliding"])
def test_malformed_layer_types_are_named(types: Any) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        architecture({**config_of("gemma2"), "layer_types": types})


def test_malformed_text_config_is_named() -> None:
    with pytest.raises(ConfigError, match="text_config"):
        architecture({"model_type": "gemma3", "text_config": 3})
