"""Phi: configuration_phi.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.reader import Config


def phi(c: Config) -> Architecture:
    figures = common(
        c,
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        hidden_act="gelu_new",
        partial_rotary_factor=0.5,
    )
    figures["dropouts"] = Dropouts(
        embedding=c.number("embd_pdrop"),
        attention=c.number("attention_dropout"),
        residual=c.number("resid_pdrop"),
    )
    return Architecture(
        **figures,
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_bias=True,
        head_bias=True,
        qk_norm=c.flag("qk_layernorm", False),
        parallel_residual=True,
        shared_norm=True,
    )
