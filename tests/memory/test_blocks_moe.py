"""Mixtures of experts: the closed form against a trace of the real code, by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vramplan import LoRA, Recipe
from vramplan.memory.precision import policy_of
from vramplan.memory.program import compile_step
from vramplan.models.hf_config import architecture

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "moe_intermediate_size": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {
        "num_experts": 16,
        "moe_intermediate_size": 96,
        "head_dim": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 16, "intermediate_size": 128, "clip_qkv": 8.0},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 64, "num_hidden_layers": 4},
    "deepseek_v2": {**LATENT, "q_lora_rank": None},
    "deepseek_v2-limited": {
        **LATENT,
        "q_lora_rank": 96,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "deepseek_v3": {**LATENT, "q_lora_rank": 96, "n_group": 4, "topk_group": 2},
}
SOME = LoRA(rank=8, dropout=0.05, target_modules=("q_proj", "v_proj", "o_proj"))
ALL = LoRA(rank=8, dropout=0.0, target_modules="all-linear")
BASE = Recipe(batch_size=2, seq_len=256)
RECIPES: dict[str, Recipe] = {
    "full": BASE,
    "one-sequence": replace(BASE, batch_size=1, seq_len=333),
    "checkpointing": replace(BASE, gradient_checkpointing=True),
    "eager": replace(BASE, attention="eager"),
    "eager-checkpointing": replace(BASE, attention="eager", gradient_checkpointing=True),
    "fp32": replace(BASE, dtype="fp32", mixed_precision="no"),
    "fp32-mixed": replace(BASE, dtype="fp32"),
    "lora-some": replace(BASE, lora=SOME),
    "lora-all": replace(BASE, lora=ALL),
    "lora-all-checkpointing": replace(BASE, lora=ALL, gradient_checkpointing=True),
    "nf4-checkpointing": replace(BASE, lora=ALL, quantization="nf4", gradient_checkpointing=True),
    "eager-nf4": replace(BASE, lora=SOME, quantization="nf4", attention="eager"),
}
CASES = [(variant, "full") for variant in VARIANTS if variant != "gpt_oss"]
CASES += [("mixtral", name) for name in ("eager-checkpointing", "lora-all", "fp32-mixed")]
CASES += [("qwen3_moe", name) for name in ("checkpointing", "lora-all-checkpointing", "lora-some")]
CASES += [("olmoe", name) for name in ("fp32", "nf4-checkpointing")]
CASES += [("gpt_oss", name) for name in ("eager", "eager-checkpointing", "eager-nf4")]
CASES += [("deepseek_v2", name) for name in ("eager", "one-sequence", "lora-all-checkpointing")]
CASES += [("deepseek_v3", name) for name in ("checkpointing", "fp32-mixed", "nf4-checkpointing")]


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_closed_form_is_the_trace(
    variant: str, name: str, agrees_with_trace: Callable[[dict[str, Any], Recipe], None]
) -> None:
    config = {"model_type": variant.partition("-")[0], **SIZES, **VARIANTS[variant]}
    agrees_with_trace(config, RECIPES[name])


def forward_end(config: dict[str, Any], recipe: Recipe) -> int:
    arch = architecture(config)
    points = compile_step(arch, policy_of(recipe, arch)).walk(recipe.batch_size, recipe.seq_len)
    return [p for p in points if p.section.phase == "forward"][-1].end


def test_adapted_experts_keep_a_copy_of_all_of_them() -> None:
    """A layer more, with all-linear, keeps its folded experts: 3 x 448 x 256 x 8 in 16 bits."""
    config = {"model_type": "mixtral", **SIZES, **VARIANTS["mixtral"]}
    deeper = {**config, "num_hidden_layers": 4}
    folded = 3 * 448 * 256 * 8 * 2

    def layer(recipe: Recipe) -> int:
        return forward_end(deeper, recipe) - forward_end(config, recipe)

    assert layer(RECIPES["lora-all"]) - layer(RECIPES["lora-some"]) > folded - 2**20
    assert layer(RECIPES["lora-all-checkpointing"]) == 2 * 256 * 256 * 2  # the boundary alone


def test_a_visited_expert_costs_rows_not_weights() -> None:
    """Each further expert a token visits adds tokens x (3 hidden + 4 width) numbers, and crumbs.

    Kept a row: the copy of the token, gate and up, the activation, their product, the output
    before its weight (hidden twice in all), in 16 bits.
    """
    config = {"model_type": "olmoe", **SIZES, **VARIANTS["olmoe"], "num_hidden_layers": 1}
    one, two = ({**config, "num_experts_per_tok": k} for k in (4, 5))
    tokens, row = 2 * 256, 2 * (2 * 256 + 4 * 128)
    assert forward_end(two, BASE) - forward_end(one, BASE) == pytest.approx(tokens * row, rel=0.03)
