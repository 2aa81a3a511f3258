"""GPT-NeoX: configuration_gpt_neox.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.reader import Config


def gpt_neox(c: Config) -> Architecture:
    """`rotary_pct` is its name of the part of a head that is rotated."""
    figures = common(
        c,
        vocab_size=50432,
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=44,
        num_attention_heads=64,
        hidden_act="gelu",
        partial_rotary_factor=c.number("rotary_pct", 0.25),
    )
    figures["dropouts"] = Dropouts(
        attention=c.number("attention_dropout"), residual=c.number("hidden_dropout")
    )
    bias = c.flag("attention_bias", True)
    return Architecture(
        **figures,
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        norm_bias=True,
        parallel_residual=c.flag("use_parallel_residual", True),
    )
