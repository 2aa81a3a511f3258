"""gpt-oss: configuration_gpt_oss.py of transformers 5.17."""

from __future__ import annotations

from vramplan.models.architecture import Architecture, Experts
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.llama_kin import SLIDING, layer_types, window
from vramplan.models.hf_config.moe import experts
from vramplan.models.hf_config.reader import Config


def gpt_oss(c: Config) -> Architecture:
    """`quantization_config` (MXFP4) is not read: training dequantizes the experts."""
    figures = common(
        c,
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
    )
    layers = figures["layers"]
    kinds = layer_types(c, layers) or tuple(
        SLIDING if i % 2 == 0 else "full" for i in range(layers)
    )
    bias = c.flag("attention_bias", True)
    return Architecture(
        **figures,
        attention_bias=bias,
        output_bias=bias,
        sliding_window=window(c, 128),
        layer_kinds=tuple("sliding" if kind == SLIDING else "full" for kind in kinds),
        experts=experts(
            c,
            Experts(
                count=c.size("num_local_experts", 128, "num_experts"),
                active=c.size("num_experts_per_tok", 4),
                width=figures["intermediate_size"],
            ),
        ),
    )
