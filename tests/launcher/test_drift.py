"""Every described family against the installed transformers: what drifts is named.

A new release of transformers, peft or torch that changes what a model allocates fails here with the
family's name and the first section of the step where description and code part.
"""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.memory.estimate import estimate
from vramplan.models.blocks import FAMILIES
from vramplan.models.hf_config import READERS
from vramplan.recipe.recipe import LoRA, Recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

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
    "gpt_neox": SIZES,
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
CRUMBS = ("prepare", "optimizer_step")
"""An estimate leaves out the draft of an expert's adapter and clipping's norms, a block each."""
SAME = {"gemma3": "gemma3_text"}
"""Read as another one's text model."""
WITHOUT_SDPA = ("bloom", "gpt_oss", "gptj")
REGIMES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapted": {"lora": LoRA(rank=8, dropout=0.0), "gradient_checkpointing": True},
}


def points(side: Any) -> dict[str, tuple[int, ...]]:
    return {
        name: (phase.end,) if name in CRUMBS else (phase.end, phase.peak)
        for name, phase in side.timeline.phases().items()
    }


def test_every_described_family_is_traced_here() -> None:
    assert {*SMALL} | {*SAME} == {*READERS}
    assert {*SMALL} == {*FAMILIES}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", SMALL)
def test_the_description_is_what_the_libraries_do(family: str, regime: str) -> None:
    """Ends and peaks within a thousandth of the peak.

    But for the peaks of the phases in CRUMBS.
    """
    from vramplan_launcher.trace import api, compare

    config = {"model_type": family, "tie_word_embeddings": False, **SMALL[family]}
    attention = "eager" if family in WITHOUT_SDPA else "sdpa"
    recipe = Recipe(batch_size=2, seq_len=256, **REGIMES[regime], attention=attention)
    needed = estimate(config, recipe)
    deep = api.run(config, recipe)
    traced = api.traced(deep, family, recipe)

    # Workspaces aside, so that they don't hide what a small model does.
    near = (traced.peak_allocated - traced.workspace) / 1000
    found, expected = points(needed), points(traced)
    off = [n for n in found if found[n] != pytest.approx(expected[n], rel=0, abs=near)]
    if off:
        parting = compare.first_parting(deep, config, recipe, None, int(near))
        pytest.fail(f"{family} has drifted in {', '.join(off)}: {found}, {expected}; {parting}")
    assert needed.parameters == traced.parameters
    assert needed.trainable_parameters == traced.trainable_parameters
