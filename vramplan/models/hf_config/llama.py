"""Llama: configuration_llama.py of transformers 5.17."""

from __future__ import annotations

from typing import Any

from vramplan.models.architecture import Architecture, Dropouts
from vramplan.models.hf_config.reader import Config


def common(c: Config, **defaults: Any) -> dict[str, Any]:
    """The figures that llama and its kin name alike; `defaults` are the class's own."""
    hidden = c.size("hidden_size", *_default(defaults, "hidden_size"))
    heads = c.size("num_attention_heads", *_default(defaults, "num_attention_heads"))
    head_dim = c.size("head_dim", defaults.get("head_dim") or hidden // heads)
    named = "num_key_value_heads" in c.values  # null says: as many as query heads
    kv_heads = None if named else defaults.get("num_key_value_heads")
    return {
        "family": c.model_type,
        "vocab_size": c.size("vocab_size", *_default(defaults, "vocab_size")),
        "hidden_size": hidden,
        "layers": c.size("num_hidden_layers", *_default(defaults, "num_hidden_layers")),
        "heads": heads,
        "kv_heads": c.size("num_key_value_heads", kv_heads or heads),
        "head_dim": head_dim,
        "intermediate_size": c.size("intermediate_size", *_default(defaults, "intermediate_size")),
        "max_positions": c.size(
            "max_position_embeddings", defaults.get("max_position_embeddings", 2048)
        ),
        "tied_embeddings": c.flag(
            "tie_word_embeddings", defaults.get("tie_word_embeddings", False)
        ),
        "activation": c.get("hidden_act", defaults.get("hidden_act", "silu")),
        "rotary_dim": int(head_dim * c.rotary_fraction(defaults.get("partial_rotary_factor", 1.0))),
        "dropouts": Dropouts(attention=c.number("attention_dropout", 0.0)),
    }


def _default(defaults: dict[str, Any], key: str) -> tuple[Any, ...]:
    return (defaults[key],) if key in defaults else ()


def llama(c: Config) -> Architecture:
    bias = c.flag("attention_bias", False)
    return Architecture(
        **common(c), attention_bias=bias, output_bias=bias, mlp_bias=c.flag("mlp_bias", False)
    )
