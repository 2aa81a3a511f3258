"""GPT-J: configuration_gptj.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.reader import Config


def gptj(c: Config) -> Architecture:
    """Without `n_inner` the feed-forward is four times as wide as the model."""
    hidden = c.size("n_embd", 4096, "hidden_size")
    heads = c.size("n_head", 16, "num_attention_heads")
    positions = c.size("n_positions", 2048, "max_position_embeddings")
    return Architecture(
        family="gptj",
        vocab_size=c.size("vocab_size", 50400),
        hidden_size=hidden,
        layers=c.size("n_layer", 28, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=c.size("n_inner", 4 * hidden),
        max_positions=positions,
        learned_positions=True,
        tied_embeddings=c.flag("tie_word_embeddings", False),
        activation=c.get("activation_function", "gelu_new"),
        gated=False,
        rotary_dim=c.size("rotary_dim", 64),
        mlp_bias=True,
        norm_bias=True,
        head_bias=True,
        parallel_residual=True,
        shared_norm=True,
        dropouts=Dropouts(
            embedding=c.number("embd_pdrop"),
            attention=c.number("attn_pdrop"),
            residual=c.number("resid_pdrop"),
        ),
        extra=(("positions", positions),),
    )
