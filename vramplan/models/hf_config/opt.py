"""OPT: configuration_opt.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.reader import Config


def opt(c: Config) -> Architecture:
    hidden = c.size("hidden_size", 768)
    heads = c.size("num_attention_heads", 12)
    width = c.size("word_embed_proj_dim", hidden)
    bias = c.flag("enable_bias", True)
    affine = c.flag("layer_norm_elementwise_affine", True)
    before = c.flag("do_layer_norm_before", True)
    last = before and not c.flag("_remove_final_layer_norm", False)
    return Architecture(
        family="opt",
        vocab_size=c.size("vocab_size", 50272),
        hidden_size=hidden,
        layers=c.size("num_hidden_layers", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=c.size("ffn_dim", 3072),
        max_positions=c.size("max_position_embeddings", 2048),
        learned_positions=True,
        tied_embeddings=c.flag("tie_word_embeddings", True),
        activation=c.get("activation_function", "relu"),
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_bias=affine,
        post_norm=not before,
        embedding_width=width if width != hidden else None,
        dropouts=Dropouts(
            attention=c.number("attention_dropout", 0.0), residual=c.number("dropout", 0.1)
        ),
        extra=(("final_norm", int(last)), ("plain_norms", int(not affine))),
    )
