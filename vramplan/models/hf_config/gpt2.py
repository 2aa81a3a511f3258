"""GPT-2: configuration_gpt2.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.reader import Config


def gpt2(c: Config) -> Architecture:
    hidden = c.size("n_embd", 768, "hidden_size")
    heads = c.size("n_head", 12, "num_attention_heads")
    return Architecture(
        family="gpt2",
        vocab_size=c.size("vocab_size", 50257),
        hidden_size=hidden,
        layers=c.size("n_layer", 12, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=c.size("n_inner", 4 * hidden),
        max_positions=c.size("n_positions", 1024, "max_position_embeddings"),
        learned_positions=True,
        tied_embeddings=c.flag("tie_word_embeddings", True),
        activation=c.get("activation_function", "gelu_new"),
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_bias=True,
        dropouts=Dropouts(
            embedding=c.number("embd_pdrop", 0.1),
            attention=c.number("attn_pdrop", 0.1),
            residual=c.number("resid_pdrop", 0.1),
        ),
        extra=(("upcast_attention", int(c.flag("reorder_and_upcast_attn", False))),),
    )
