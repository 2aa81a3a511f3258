"""BLOOM: configuration_bloom.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.reader import Config


def bloom(c: Config) -> Architecture:
    hidden = c.size("n_embed", c.size("hidden_size", 64))
    heads = c.size("n_head", 8, "num_attention_heads")
    return Architecture(
        family="bloom",
        vocab_size=c.size("vocab_size", 250880),
        hidden_size=hidden,
        layers=c.size("n_layer", 2, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        tied_embeddings=c.flag("tie_word_embeddings", True),
        activation="bloom_gelu",
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_bias=True,
        dropouts=Dropouts(
            attention=c.number("attention_dropout", 0.0),
            residual=c.number("hidden_dropout", 0.0),
        ),
        extra=(
            (
                "residual_after_norm",
                int(c.flag("apply_residual_connection_post_layernorm", False)),
            ),
        ),
    )
