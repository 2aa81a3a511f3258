"""Llama's kin: each configuration class of transformers 5.17 with its own defaults."""

from __future__ import annotations

from typing import Any

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.reader import Config

SLIDING = "sliding_attention"


def window(c: Config, default: int | None) -> int | None:
    """`sliding_window`, where null says: no window."""
    value = c.values.get("sliding_window", default)
    return None if value is None else c.size("sliding_window", default)


def layer_types(c: Config, layers: int) -> tuple[str, ...]:
    """`layer_types` as written; empty where there are none."""
    return tuple(str(kind) for kind in _each_layer(c, "layer_types", layers) or ())


def _each_layer(c: Config, key: str, layers: int) -> list[Any] | None:
    """A list with an entry for every layer; None where the config has none."""
    value = c.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) < layers:
        raise ConfigError(f"{key} in the config must be a list of {layers} entries, one a layer")
    return value[:layers]


def mistral(c: Config) -> Architecture:
    """configuration_mistral.py"""
    defaults: dict[str, Any] = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
    return Architecture(**common(c, **defaults), sliding_window=window(c, 4096))


def _upper_window(c: Config, layers: int) -> dict[str, Any]:
    """`use_sliding_window`: a window in the layers from `max_window_layers` on."""
    width = window(c, 4096) if c.flag("use_sliding_window", False) else None
    first = c.count("max_window_layers", 28)
    kinds = layer_types(c, layers) or tuple(
        SLIDING if i >= first else "full" for i in range(layers)
    )
    if width is None or SLIDING not in kinds:
        return {}
    return {
        "sliding_window": width,
        "layer_kinds": tuple("sliding" if kind == SLIDING else "full" for kind in kinds),
    }


def qwen2(c: Config) -> Architecture:
    """configuration_qwen2.py"""
    figures = common(c, num_key_value_heads=32, max_position_embeddings=32768)
    return Architecture(**figures, attention_bias=True, **_upper_window(c, figures["layers"]))


def qwen3(c: Config) -> Architecture:
    """configuration_qwen3.py"""
    figures = common(c, num_key_value_heads=32, head_dim=128, max_position_embeddings=32768)
    bias = c.flag("attention_bias", False)
    return Architecture(
        **figures,
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        **_upper_window(c, figures["layers"]),
    )


def smollm3(c: Config) -> Architecture:
    """configuration_smollm3.py"""
    figures = common(
        c, num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=True
    )
    layers = figures["layers"]
    interval = c.size("no_rope_layer_interval", 4)
    rotated = _each_layer(c, "no_rope_layers", layers)
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(layers)]
    width = window(c, None) if c.flag("use_sliding_window", False) else None
    types = layer_types(c, layers) or tuple(
        "full" if rotated[i] else SLIDING for i in range(layers)
    )
    slides = [width is not None and kind == SLIDING for kind in types]
    bias = c.flag("attention_bias", False)
    return Architecture(
        **figures,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
        sliding_window=width if any(slides) else None,
        layer_kinds=tuple(
            ("sliding" if slides[i] else "full") + ("" if rotated[i] else " nope")
            for i in range(layers)
        ),
    )


def granite(c: Config) -> Architecture:
    """configuration_granite.py"""
    bias = c.flag("attention_bias", False)
    return Architecture(
        **common(c),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=c.flag("mlp_bias", False),
        embedding_scale=True,
        residual_scale=True,
        logit_scale=True,
    )


def olmo(c: Config) -> Architecture:
    """configuration_olmo.py"""
    bias = c.flag("attention_bias", False)
    clips = c.number("clip_qkv", 0.0) > 0
    return Architecture(
        **common(c),
        attention_bias=bias,
        output_bias=bias,
        extra=(("clips", 1),) if clips else (),
    )


def olmo2(c: Config) -> Architecture:
    """configuration_olmo2.py"""
    bias = c.flag("attention_bias", False)
    return Architecture(
        **common(c), attention_bias=bias, output_bias=bias, qk_norm=True, post_norm=True
    )


def stablelm(c: Config) -> Architecture:
    """configuration_stablelm.py"""
    figures = common(
        c,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        partial_rotary_factor=0.25,
    )
    figures["dropouts"] = Dropouts(
        attention=c.number("attention_dropout", 0.0), residual=c.number("hidden_dropout", 0.0)
    )
    parallel = c.flag("use_parallel_residual", False)
    return Architecture(
        **figures,
        attention_bias=c.flag("use_qkv_bias", False),
        norm_bias=True,
        qk_norm=c.flag("qk_layernorm", False),
        parallel_residual=parallel,
        shared_norm=parallel,
    )


def starcoder2(c: Config) -> Architecture:
    """configuration_starcoder2.py"""
    figures = common(
        c,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    )
    figures["dropouts"] = Dropouts(
        embedding=c.number("embedding_dropout", 0.0),
        attention=c.number("attention_dropout", 0.0),
        residual=c.number("residual_dropout", 0.0),
    )
    bias = c.flag("use_bias", True)
    return Architecture(
        **figures,
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_bias=True,
        sliding_window=window(c, None),
    )


def cohere(c: Config) -> Architecture:
    """configuration_cohere.py"""
    bias = c.flag("attention_bias", False)
    return Architecture(
        **common(c, max_position_embeddings=8192, tie_word_embeddings=True),
        attention_bias=bias,
        output_bias=bias,
        qk_norm=c.flag("use_qk_norm", False),
        parallel_residual=True,
        shared_norm=True,
        logit_scale=True,
    )


def glm(c: Config) -> Architecture:
    """configuration_glm.py and configuration_glm4.py"""
    figures = common(
        c,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        partial_rotary_factor=0.5,
    )
    return Architecture(
        **figures,
        attention_bias=c.flag("attention_bias", True),
        post_norm=c.model_type == "glm4",
    )


def phi3(c: Config) -> Architecture:
    """configuration_phi3.py; `embd_pdrop` is read by no code."""
    figures = common(c, max_position_embeddings=4096)
    figures["dropouts"] = Dropouts(
        attention=c.number("attention_dropout", 0.0), residual=c.number("resid_pdrop", 0.0)
    )
    return Architecture(**figures, sliding_window=window(c, None))
