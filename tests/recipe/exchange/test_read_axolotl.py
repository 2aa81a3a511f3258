"""Axolotl's YAML: what each key makes of the recipe, and what can't be honoured."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vramplan import DeepSpeed, LoRA, Recipe
from vramplan.errors import IllegalRecipe, InvalidValue, UserError
from vramplan.recipe.exchange import axolotl, read_any
from vramplan.recipe.exchange.axolotl_keys import HARMLESS, REFUSED, UNMODELLED

QLORA = """
base_model: acme/tiny-8b
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: acme/rows
    type: alpaca
val_set_size: 0.05
output_dir: ./out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.1
lora_target_linear: true
lora_mlp_kernel: false
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
tf32: false
gradient_checkpointing: true
attn_implementation: flash_attention_2
special_tokens:
  pad_token: <|end_of_text|>
"""
FULL = {"base_model": "m", "micro_batch_size": 1, "attn_implementation": "flash_attention_2"}
LORA = {**FULL, "adapter": "lora", "lora_r": 8, "lora_target_linear": True, "lora_o_kernel": False}


def read(**keys: Any) -> Any:
    return axolotl.read({**FULL, **keys}, "a.yml")


def test_a_whole_file(tmp_path: Any) -> None:
    path = tmp_path / "qlora.yml"
    path.write_text(QLORA)
    made = read_any(path)
    assert (made.kind, made.model) == ("axolotl", "acme/tiny-8b")
    assert made.recipe == Recipe(
        quantization="nf4",
        lora=LoRA(rank=32, alpha=16, dropout=0.1),
        attention="flash_attention_2",
        gradient_checkpointing=True,
        optimizer="paged_adamw_32bit",
        batch_size=2,
        seq_len=4096,
        gradient_accumulation_steps=4,
    )
    options = made.options
    assert (options.data, options.learning_rate, options.epochs) == ("acme/rows", 2e-4, 3)
    assert options.output == "./out"
    # Of what Axolotl does unasked, the 16-bit embeddings are left; its kernels are turned off.
    assert len(made.warnings) == 1
    assert "back to 16 bits" in made.warnings[0]
    assert {"lr_scheduler", "special_tokens", "val_set_size"} <= set(made.quiet)


def test_defaults_are_axolotls() -> None:
    recipe = axolotl.read({"base_model": "m"}, "a.yml").recipe
    assert recipe == Recipe(seq_len=512)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp16": ({"fp16": True, **LORA}, {"dtype": "fp16", "mixed_precision": "fp16"}),
    "fp16 over auto": (
        {"bf16": "auto", "float16": True},
        {"dtype": "fp16", "mixed_precision": "no"},
    ),
    "fp32": (
        {"bf16": False, "attn_implementation": "sdpa"},
        {"dtype": "fp32", "mixed_precision": "no", "attention": "sdpa"},
    ),
    "pure bf16": ({"bf16": "full"}, {"dtype": "bf16", "mixed_precision": "no"}),
    "batch by its product": (
        {"micro_batch_size": 2, "batch_size": 8},
        {"batch_size": 2, "gradient_accumulation_steps": 4},
    ),
    "int8": ({**LORA, "load_in_8bit": True}, {"quantization": "int8"}),
    "int8 without bf16 is over fp16": (
        {**LORA, "load_in_8bit": True, "bf16": False},
        {"quantization": "int8", "dtype": "fp16", "mixed_precision": "no"},
    ),
    "fp4": (
        {
            **LORA,
            "adapter": "qlora",
            "load_in_4bit": True,
            "bnb_config_kwargs": {
                "bnb_4bit_quant_type": "fp4",
                "bnb_4bit_use_double_quant": False,
            },
        },
        {"quantization": "fp4", "double_quant": False},
    ),
    "targets": (
        {**LORA, "lora_target_linear": False, "lora_target_modules": ["v_proj", "q_proj"]},
        {"lora": LoRA(rank=8, dropout=0, target_modules=("q_proj", "v_proj"))},
    ),
    "adapters as the weights": (
        {**LORA, "peft_autocast_adapter_dtype": False},
        {"lora": LoRA(rank=8, dropout=0, dtype="bf16")},
    ),
    "old flag": ({"attn_implementation": None, "eager_attention": True}, {"attention": "eager"}),
    "deepspeed": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": True}}},
        {"deepspeed": DeepSpeed(stage=2, reduce_bucket_size=int(5e8))},
    ),
    "optimizer's other name": ({"optimizer": "ao_adamw_8bit"}, {"optimizer": "adamw_torch_8bit"}),
    "numbers as text": ({"micro_batch_size": "4"}, {"batch_size": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_keys_make(case: str) -> None:
    keys, expected = CASES[case]
    recipe = read(**keys).recipe
    assert {name: getattr(recipe, name) for name in expected} == expected


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": "muon"}, "optimizer: muon is not modelled: estimated as adamw"),
    "attention": (
        {"attn_implementation": "flash_attention_3"},
        "flash_attention_3 is not modelled: estimated as flash_attention_2",
    ),
    "offload": ({"gradient_checkpointing": "offload"}, "offload is estimated as true"),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "use_reentrant: true is estimated as non-reentrant",
    ),
    "kernels unasked": ({**LORA, "lora_o_kernel": None}, "are turned on where they are not set"),
    "4 bits without qlora": ({**LORA, "load_in_4bit": True}, "counts with adapter qlora only"),
    "fp32 embeddings": ({"attn_implementation": "sdpa"}, "trains embeddings, norms and the output"),
    "plugin": (
        {"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]},
        "cut_cross_entropy is not honoured",
    ),
    "unknown": (
        {"gradient_chekpointing": True},
        "unknown key 'gradient_chekpointing'; nearest: 'gradient_checkpointing'",
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_is_warned_of(case: str) -> None:
    keys, said = WARNED[case]
    warnings = read(**keys).warnings
    assert len(warnings) == 1
    assert re.search(said, warnings[0]), warnings


def test_nothing_is_warned_of_that_is_honoured() -> None:
    assert read().warnings == ()
    assert read(**LORA).warnings == ()


@pytest.mark.parametrize("key", sorted(UNMODELLED))
def test_every_key_that_is_not_honoured_is_named(key: str) -> None:
    value: Any = ["embed_tokens"] if "modules" in key else True
    (warning,) = [w for w in read(**{**LORA, key: value}).warnings if f" {key}: " in w]
    assert warning.endswith(f"is not honoured: {UNMODELLED[key]}")
    for nothing in (False, [], ""):
        assert not any(key in w for w in read(**{**LORA, key: nothing}).warnings)


def test_targets_as_a_regular_expression() -> None:
    pattern = r"model.language_model.layers.[\d]+.(mlp|self_attn).(up|down|q)_proj"
    made = read(**{**LORA, "lora_target_linear": False, "lora_target_modules": pattern})
    assert made.recipe.lora.target_modules == ("down_proj", "q_proj", "up_proj")
    (warning,) = made.warnings
    assert "a regular expression, is estimated as up_proj, down_proj, q_proj" in warning
    with pytest.raises(IllegalRecipe, match="can't be read: it is a regular expression"):
        read(**{**LORA, "lora_target_linear": False, "lora_target_modules": r".*attn\..*"})
    plain = read(**{**LORA, "lora_target_linear": False, "lora_target_modules": "q_proj, v_proj"})
    assert plain.recipe.lora.target_modules == ("q_proj", "v_proj")


def test_what_costs_no_memory_is_passed_over() -> None:
    assert not HARMLESS & UNMODELLED.keys()
    taken = {"datasets", "plugins", "output_dir"} | {k for k in HARMLESS if k.startswith("lora_")}
    others = dict.fromkeys(HARMLESS - taken - {"peft_autocast_adapter_dtype"}, "x")
    made = read(**others)
    assert made.warnings == ()
    assert set(made.quiet) >= set(others) - {"xformers_attention"}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_other_kinds_of_run_are_refused(key: str) -> None:
    with pytest.raises(IllegalRecipe, match=f"a.yml: {key} can't be estimated"):
        read(**{key: "dpo"})


def test_wrong_values() -> None:
    with pytest.raises(UserError, match="a.yml has no base_model"):
        axolotl.read({"sequence_len": 1}, "a.yml")
    with pytest.raises(InvalidValue, match="a.yml: sequence_len is 'long': it must be a number"):
        read(sequence_len="long")
    with pytest.raises(InvalidValue, match="a.yml: micro_batch_size is 0.0"):
        read(micro_batch_size=0)
    for odd in (float("nan"), float("inf"), 10**400):
        with pytest.raises(InvalidValue, match="a.yml: sequence_len is"):
            read(sequence_len=odd)
    with pytest.raises(InvalidValue, match="a.yml: bnb_config_kwargs is 5: it must be a table"):
        read(bnb_config_kwargs=5)
    assert read(plugins=5).recipe == read().recipe
    with pytest.raises(InvalidValue, match="a.yml: bf16 is 'maybe'"):
        read(bf16="maybe")
    with pytest.raises(UserError, match="adapter lora without lora_r"):
        read(**{**LORA, "lora_r": None})
    with pytest.raises(UserError, match="neither lora_target_linear nor lora_target_modules"):
        read(**{**LORA, "lora_target_linear": False})
    with pytest.raises(IllegalRecipe, match="adapter llama-adapter can't be estimated"):
        read(adapter="llama-adapter")
    with pytest.raises(UserError, match="there is no file 'zero9.json', here or above a.yml"):
        read(deepspeed="zero9.json")
    with pytest.raises(IllegalRecipe, match="a.yml: quantization 'nf4' with full fine-tuning"):
        read(load_in_4bit=True)
