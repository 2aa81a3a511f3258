"""DeepSeek V2 and V3: configuration_deepseek_v{2,3}.py of transformers 5.17."""

from __future__ import annotations

from typing import Any

from vramplan.errors import ConfigError
from vramplan.models.architecture import Architecture, Experts, LatentAttention
from vramplan.models.hf_config.llama import common
from vramplan.models.hf_config.moe import experts
from vramplan.models.hf_config.reader import Config


def deepseek_v2(c: Config) -> Architecture:
    """configuration_deepseek_v2.py"""
    figures = common(
        c,
        vocab_size=102400,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    method = c.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(
            f"topk_method in the config is {method!r}; transformers knows 'greedy' and "
            "'group_limited_greedy' for deepseek_v2"
        )
    extra: tuple[tuple[str, int], ...] = ()
    if method == "group_limited_greedy":
        extra = (("group_limited", 1), ("active_groups", c.size("topk_group")))
    return _architecture(
        c,
        figures,
        count=c.size("n_routed_experts", 64, "num_experts"),
        active=c.size("num_experts_per_tok"),
        width=c.size("moe_intermediate_size", 1407),
        shared=c.size("n_shared_experts", 2),
        groups=c.size("n_group", 1),
        first_dense=c.count("first_k_dense_replace", 0),
        mlp_bias=c.flag("mlp_bias", False),
        extra=extra,
    )


def deepseek_v3(c: Config) -> Architecture:
    """configuration_deepseek_v3.py; multi-token prediction layers are not instantiated."""
    figures = common(
        c,
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        max_position_embeddings=4096,
    )
    extra = [("active_groups", c.size("topk_group", 4))]
    if c.flag("norm_topk_prob", True):
        extra.append(("normalizes", 1))
    if c.flag("rope_interleave", True):
        extra.append(("interleaved", 1))
    return _architecture(
        c,
        figures,
        count=c.size("n_routed_experts", 256, "num_local_experts"),
        active=c.size("num_experts_per_tok", 8),
        width=c.size("moe_intermediate_size", 2048),
        shared=c.size("n_shared_experts", 1),
        groups=c.size("n_group", 8),
        first_dense=c.count("first_k_dense_replace", 3),
        mlp_bias=False,
        extra=tuple(extra),
    )


def _architecture(
    c: Config,
    figures: dict[str, Any],
    *,
    count: int,
    active: int,
    width: int,
    shared: int,
    groups: int,
    first_dense: int,
    mlp_bias: bool,
    extra: tuple[tuple[str, int], ...],
) -> Architecture:
    latent = _latent(c)
    bias = c.flag("attention_bias", False)
    return Architecture(
        **{
            **figures,
            "kv_heads": figures["heads"],
            "head_dim": latent.nope_head_dim + latent.rope_head_dim,
            "rotary_dim": latent.rope_head_dim,
        },
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=mlp_bias,
        latent=latent,
        experts=experts(
            c,
            Experts(
                count=count,
                active=active,
                width=width,
                shared_width=width * shared,
                groups=groups,
                first_dense=first_dense,
            ),
        ),
        extra=extra,
    )


def _latent(c: Config) -> LatentAttention:
    """Both classes share these defaults; a null q_lora_rank says: a plain projection."""
    rank = c.values.get("q_lora_rank", 1536)
    return LatentAttention(
        query_rank=None if rank is None else c.size("q_lora_rank", 1536),
        key_value_rank=c.size("kv_lora_rank", 512),
        nope_head_dim=c.size("qk_nope_head_dim", 128),
        rope_head_dim=c.size("qk_rope_head_dim", 64),
        value_head_dim=c.size("v_head_dim", 128),
    )
