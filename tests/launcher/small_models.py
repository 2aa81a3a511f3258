"""A small configuration of every described family: its real structure, three layers."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_HEADS = {**SIZES, "num_key_value_heads": 8}
WIDE_HEADS = {**SIZES, "head_dim": 64}
GPT: dict[str, Any] = {
    "vocab_size": 1000,
    "n_embd": 256,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    **ALL_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
}
ROUTED: dict[str, Any] = {**SIZES, "num_experts_per_tok": 2}
SMALL: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 1000, "hidden_size": 256, "n_layer": 3, "n_head": 8},
    "cohere": SIZES,
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v3": {**LATENT, "q_lora_rank": 96, "n_group": 4, "topk_group": 2},
    "falcon": {**SIZES, "hidden_size": 224, "num_attention_heads": 7},
    "gemma": WIDE_HEADS,
    "gemma2": WIDE_HEADS,
    "gemma3_text": WIDE_HEADS,
    "glm": WIDE_HEADS,
    "glm4": WIDE_HEADS,
    "gpt2": GPT,
    "gpt_neox": ALL_HEADS,
    "gpt_oss": {**ROUTED, "num_local_experts": 8, "head_dim": 64},
    "gptj": {**GPT, "rotary_dim": 16},
    "granite": SIZES,
    "llama": SIZES,
    "mistral": SIZES,
    "mixtral": {**ROUTED, "num_local_experts": 8},
    "olmo": ALL_HEADS,
    "olmo2": ALL_HEADS,
    "olmoe": {**ROUTED, "num_experts": 8},
    "opt": {**SIZES, "ffn_dim": 704},
    "phi": ALL_HEADS,
    "phi3": ALL_HEADS,
    "qwen2": SIZES,
    "qwen3": WIDE_HEADS,
    "qwen3_moe": {**ROUTED, "num_experts": 8, "moe_intermediate_size": 96, "head_dim": 64},
    "smollm3": SIZES,
    "stablelm": ALL_HEADS,
    "starcoder2": SIZES,
}
WITHOUT_SDPA = ("bloom", "gpt_oss", "gptj")


def config_of(family: str) -> dict[str, Any]:
    """A family's small config.json."""
    return {"model_type": family, "tie_word_embeddings": False, **SMALL[family]}
