"""Gemma: configuration_{gemma,gemma2,gemma3}.py of transformers 5.17."""

from __future__ import annotations

from typing import Any

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.reader import Config

KINDS = {"sliding_attention": "sliding", "full_attention": "full"}


def gemma(c: Config) -> Architecture:
    figures = common(
        c,
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return Architecture(**figures, **_biases(c), embedding_scale=True)


def gemma2(c: Config) -> Architecture:
    figures = _windowed(c, vocab_size=256000, max_position_embeddings=8192, pattern=2)
    return Architecture(
        **figures,
        attention_softcap=c.values.get("attn_logit_softcapping", 50.0) is not None,
        logit_softcap=c.values.get("final_logit_softcapping", 30.0) is not None,
    )


def gemma3_text(c: Config) -> Architecture:
    """Its attention has a softcap key too, which Gemma3Attention.forward does not pass on."""
    pattern = c.size("sliding_window_pattern", 6)
    figures = _windowed(c, vocab_size=262208, max_position_embeddings=131072, pattern=pattern)
    return Architecture(
        **{**figures, "family": "gemma3_text"},
        qk_norm=True,
        logit_softcap=c.values.get("final_logit_softcapping") is not None,
    )


def gemma3(c: Config) -> Architecture:
    """The text model alone (Gemma3ForCausalLM on `text_config`): no vision tower, no projector."""
    text = c.get("text_config", {})
    if not isinstance(text, dict):
        raise ConfigError(f"text_config in the config is {text!r}; it must be an object")
    return gemma3_text(Config({**text, "model_type": "gemma3_text"}))


def _windowed(c: Config, *, pattern: int, **defaults: Any) -> dict[str, Any]:
    """What gemma2 and gemma3 share: every `pattern`-th layer sees all tokens."""
    figures = common(
        c,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        **defaults,
    )
    layers = figures["layers"]
    named = c.get("layer_types", None)
    if named is None:
        kinds = tuple("full" if (i + 1) % pattern == 0 else "sliding" for i in range(layers))
    else:
        kinds = _kinds(named, layers)
    return {
        **figures,
        **_biases(c),
        "activation": c.get("hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": True,
        "sliding_window": c.size("sliding_window", 4096),
        "layer_kinds": kinds,
    }


def _kinds(named: Any, layers: int) -> tuple[str, ...]:
    """layer_types in our words."""
    if not isinstance(named, list) or len(named) != layers or not set(named) <= set(KINDS):
        raise ConfigError(
            f"layer_types in the config is {named!r}; it must be a list of {layers} (one a layer) "
            f"of {' or '.join(map(repr, KINDS))}"
        )
    return tuple(KINDS[name] for name in named)


def _biases(c: Config) -> dict[str, Any]:
    bias = c.flag("attention_bias", False)
    return {"attention_bias": bias, "output_bias": bias}
