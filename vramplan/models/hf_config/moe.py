"""Mixtral, Qwen3-MoE and OLMoE: configuration_*.py of transformers 5.17."""

from __future__ import annotations

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture, Experts
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.llama_kin import window
from vramplan.models.hf_config.reader import Config


def experts(c: Config, figures: Experts) -> Experts:
    """Checked: no more experts visited than there are."""
    if figures.active > figures.count:
        raise ConfigError(
            f"num_experts_per_tok in the config is {figures.active}, but a layer has "
            f"{figures.count} experts"
        )
    return figures


def mixtral(c: Config) -> Architecture:
    """configuration_mixtral.py"""
    figures = common(
        c,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    return Architecture(
        **figures,
        sliding_window=window(c, None),
        experts=experts(
            c,
            Experts(
                count=c.size("num_local_experts", 8, "num_experts"),
                active=c.size("num_experts_per_tok", 2),
                width=figures["intermediate_size"],
            ),
        ),
    )


def qwen3_moe(c: Config) -> Architecture:
    """configuration_qwen3_moe.py; head_dim is hidden_size / heads where the config has none."""
    figures = common(
        c,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    bias = c.flag("attention_bias", False)
    step = c.size("decoder_sparse_step", 1)
    listed = c.get("mlp_only_layers", [])
    dense = tuple(i for i in range(figures["layers"]) if i in listed or (i + 1) % step != 0)
    return Architecture(
        **figures,
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        sliding_window=window(c, 4096) if c.flag("use_sliding_window", False) else None,
        experts=experts(
            c,
            Experts(
                count=c.size("num_experts", 128, "num_local_experts"),
                active=c.size("num_experts_per_tok", 8),
                width=c.size("moe_intermediate_size", 768),
                dense_layers=dense,
            ),
        ),
        extra=_normalizes(c),
    )


def olmoe(c: Config) -> Architecture:
    """configuration_olmoe.py"""
    figures = common(
        c,
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
    )
    bias = c.flag("attention_bias", False)
    clips = (("clips", 1),) if c.get("clip_qkv", None) is not None else ()
    return Architecture(
        **figures,
        attention_bias=bias,
        output_bias=bias,
        qk_norm=True,
        experts=experts(
            c,
            Experts(
                count=c.size("num_experts", 64, "num_local_experts"),
                active=c.size("num_experts_per_tok", 8),
                width=figures["intermediate_size"],
            ),
        ),
        extra=clips + _normalizes(c),
    )


def _normalizes(c: Config) -> tuple[tuple[str, int], ...]:
    """The chosen experts' weights are divided by their sum."""
    return (("normalizes", 1),) if c.flag("norm_topk_prob", False) else ()
