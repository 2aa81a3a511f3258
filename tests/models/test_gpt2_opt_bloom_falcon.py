"""GPT-2, OPT, BLOOM and Falcon: what is read and described, against what transformers builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vramplan.errors import ConfigError
from vramplan.models.hf_config import architecture
from vramplan.models.tensors import inventory

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("gpt2", "opt", "bloom", "falcon")
GPT2: dict[str, Any] = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
}
OPT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
BLOOM: dict[str, Any] = {"vocab_size": 160, "hidden_size": 64, "n_layer": 3, "n_head": 4}
FALCON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
OLD = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2-untied": {**GPT2, "tie_word_embeddings": False, "n_inner": 96},
    "opt": OPT,
    "opt-projected": {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt-bare": {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False},
    "opt-no-last-norm": {**OPT, "_remove_final_layer_norm": True},
    "bloom": BLOOM,
    "bloom-alias": {**BLOOM, "hidden_size": 8, "n_embed": 64},
    "falcon": FALCON,
    "falcon-grouped": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-one-norm": {
        **FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 96,
    },
    "falcon-old": {**FALCON, **OLD},
}


def config_of(variant: str) -> dict[str, Any]:
    return {"model_type": variant.partition("-")[0], **VARIANTS[variant]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_the_model(
    variant: str, same_names: Callable[[dict[str, Any]], None]
) -> None:
    same_names(config_of(variant))


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_keys_take_the_class_defaults(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    defaults = transformers.AutoConfig.for_model(family).to_dict()
    given = {k: v for k, v in defaults.items() if v is not None}
    assert architecture({"model_type": family}) == architecture(given)


def test_opt_350m_is_narrow_at_both_ends() -> None:
    arch = architecture(config_of("opt-projected"))
    shapes = {t.name: t.shape for t in inventory(arch)}
    assert shapes["model.decoder.embed_tokens.weight"] == (160, 32)
    assert shapes["model.decoder.project_in.weight"] == (64, 32)
    assert shapes["model.decoder.project_out.weight"] == (32, 64)
    assert shapes["model.decoder.embed_positions.weight"] == (32 + 2, 64)
    assert "model.decoder.final_layer_norm.weight" not in shapes  # norms come after sublayers


def test_gpt2_stores_its_weights_transposed() -> None:
    found = {t.name: t for t in inventory(architecture(config_of("gpt2")))}
    fused = found["transformer.h.{layer}.attn.c_attn.weight"]
    assert (fused.shape, fused.transposed, fused.quantizable) == ((64, 3 * 64), True, True)


def test_falcon_linears_are_adapted_but_never_quantized() -> None:
    linears = [t for t in inventory(architecture(config_of("falcon"))) if t.role == "linear"]
    assert len(linears) == 4
    assert all(t.adaptable and not t.quantizable for t in linears)


def test_the_libraries_agree_on_falcon_and_gpt2() -> None:
    """transformers leaves Falcon's subclass alone and takes Conv1D; peft adapts both."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from transformers.integrations import bitsandbytes as integration

    kinds: dict[str, set[str]] = {}
    adapted: dict[str, int] = {}
    for family in ("falcon", "gpt2"):
        config = transformers.AutoConfig.for_model(**config_of(family))
        with torch.device("meta"):
            plain = transformers.AutoModelForCausalLM.from_config(config)
            quantized = integration.replace_with_bnb_linear(
                transformers.AutoModelForCausalLM.from_config(config),
                modules_to_not_convert=["lm_head"],
                quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
            )
        kinds[family] = {type(m).__name__ for m in quantized.modules() if hasattr(m, "weight")}
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
        model = peft.get_peft_model(plain, lora)
        adapted[family] = sum(
            n.endswith("lora_A.default.weight") for n, _ in model.named_parameters()
        )

    assert "FalconLinear" in kinds["falcon"]
    assert "Linear4bit" not in kinds["falcon"]
    assert "Linear4bit" in kinds["gpt2"]
    assert "Conv1D" not in kinds["gpt2"]
    assert adapted == {"falcon": 3 * 4, "gpt2": 3 * 4}  # layers x linears


def test_a_malformed_key_is_named() -> None:
    with pytest.raises(ConfigError, match="n_embd"):
        architecture({"model_type": "gpt2", "n_embd": "wide"})
