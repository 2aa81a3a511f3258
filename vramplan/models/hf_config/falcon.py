"""Falcon: configuration_falcon.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.reader import Config


def falcon(c: Config) -> Architecture:
    hidden = c.size("n_embed", c.size("hidden_size", 4544))
    heads = c.size("num_attention_heads", 71)
    grouped = c.flag("new_decoder_architecture", False)
    alibi = c.flag("alibi", False)
    bias = c.flag("bias", False)
    kv_heads = c.size("num_kv_heads", heads)
    if not grouped:
        kv_heads = 1 if c.flag("multi_query", True) else heads
    norms = c.size("num_ln_in_parallel_attn", 2 if grouped else 1)
    return Architecture(
        family="falcon",
        vocab_size=c.size("vocab_size", 65024),
        hidden_size=hidden,
        layers=c.size("num_hidden_layers", 32),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=c.size("ffn_hidden_size", 4 * hidden),
        max_positions=c.size("max_position_embeddings", 2048),
        tied_embeddings=c.flag("tie_word_embeddings", True),
        activation=c.get("activation", "gelu"),
        gated=False,
        rotary_dim=0 if alibi else hidden // heads,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_bias=True,
        parallel_residual=grouped or c.flag("parallel_attn", True),
        shared_norm=norms == 1,
        dropouts=Dropouts(
            attention=c.number("attention_dropout", 0.0),
            residual=c.number("hidden_dropout", 0.0),
        ),
        extra=(("alibi", int(alibi)), ("grouped", int(grouped))),
    )
