"""Mixtures of experts: the parameters that are described, against transformers' and peft's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vramplan.errors import ConfigError
from vramplan.models.hf_config import architecture
from vramplan.models.stack import Stack
from vramplan.models.tensors import inventory, parameter_count

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"]
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 32},
    "qwen3_moe-some-dense": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "num_key_value_heads": 2},
    "gpt_oss": {"num_local_experts": 8, "num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v2-biases": {**LATENT, "q_lora_rank": 20, "attention_bias": True, "mlp_bias": True},
    "deepseek_v3": {**LATENT, "q_lora_rank": 20, "n_group": 4, "topk_group": 2},
}


def config_of(variant: str) -> dict[str, Any]:
    return {"model_type": variant.partition("-")[0], **SIZES, **VARIANTS[variant]}


def build(config: dict[str, Any]) -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config)
        )


def test_olmoe_1b_7b() -> None:
    """16 layers of 64 experts of 3 x 2048 x 1024, as published: 6.9 billion, 1.3 of them active.

    attention 4 x 2048^2, its norms 2 x 2048, router 64 x 2048, block norms 2 x 2048.
    """
    layer = 64 * 3 * 2048 * 1024 + 4 * 2048**2 + 64 * 2048 + 4 * 2048
    total = 16 * layer + 2 * 50304 * 2048 + 2048
    assert total == 6_919_161_856
    arch = architecture({"model_type": "olmoe", "intermediate_size": 1024})
    assert parameter_count(arch) == total


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_model(
    variant: str, same_names: Callable[[dict[str, Any]], None]
) -> None:
    same_names(config_of(variant))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_the_class_defaults(family: str) -> None:
    """The config with only its sizes reads as the one that transformers completes."""
    transformers = pytest.importorskip("transformers")
    short = {"model_type": family, **SIZES}
    completed = transformers.AutoConfig.for_model(**short).to_dict()
    assert architecture(short) == architecture(completed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_plain_linears_are_quantized(variant: str) -> None:
    """transformers replaces modules whose type is nn.Linear: no expert, no router."""
    torch = pytest.importorskip("torch")
    config = config_of(variant)
    built = build(config)
    linears = {f"{n}.weight" for n, m in built.named_modules() if type(m) is torch.nn.Linear}
    described = inventory(architecture(config))
    quantizable = {n for t in described if t.quantizable for n in t.names()}
    assert quantizable == linears - {"lm_head.weight"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_linear_adapts_experts_as_peft_does(variant: str) -> None:
    """With transformers 5 peft adapts fused experts and routers too, gpt-oss's excepted."""
    peft = pytest.importorskip("peft")
    config, rank = config_of(variant), 4
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules="all-linear", lora_dropout=0.0
    )
    adapted = peft.get_peft_model(build(config), lora)
    expected = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    found = 0
    for t in inventory(architecture(config)):
        if t.former or t.adaptable:
            experts = t.shape[0] if len(t.shape) == 3 else 1
            ranks = rank * (len(t.former) or 1) * experts
            found += t.count * ranks * sum(t.shape[-2:])
    assert found == expected


def test_peft_refuses_dropout_on_experts() -> None:
    peft = pytest.importorskip("peft")
    given = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "lora_dropout": 0.05}
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        peft.get_peft_model(build(config_of("qwen3_moe")), peft.LoraConfig(**given))
    peft.get_peft_model(build(config_of("gpt_oss")), peft.LoraConfig(**given))  # adapts no expert


def test_the_correction_bias_stays_fp32() -> None:
    arch = architecture(config_of("deepseek_v3"))
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    (bias,) = [t for t in inventory(arch) if name in t.names()]
    assert (bias.role, bias.numel, bias.dtype) == ("buffer", 8, "fp32")


def test_shapes_of_a_stack() -> None:
    """gate and up side by side; transposed, products read them as they lie."""
    sizes = {"name": "experts", "count": 4, "active": 2, "hidden": 8, "width": 3}
    plain, transposed = Stack(**sizes), Stack(**sizes, transposed=True)
    assert plain.shapes == {"gate_up_proj": (4, 6, 8), "down_proj": (4, 8, 3)}
    assert transposed.shapes == {"gate_up_proj": (4, 8, 6), "down_proj": (4, 3, 8)}


def test_more_visited_experts_than_there_are() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok in the config is 9"):
        architecture({**config_of("mixtral"), "num_experts_per_tok": 9})


def test_an_unknown_routing_method_is_named() -> None:
    with pytest.raises(ConfigError, match="topk_method in the config is 'noaux_tc'"):
        architecture({**config_of("deepseek_v2"), "topk_method": "noaux_tc"})
