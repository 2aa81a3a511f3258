"""LLaMA-Factory's YAML, TrainingArguments, TRL's files, and how a file's kind is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan import DeepSpeed, LoRA, Recipe
from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName, UserError
from vramplan.recipe.exchange import llama_factory, read_any, training_arguments
from vramplan.recipe.exchange.llama_factory_keys import HARMLESS, UNMODELLED

SFT = """
### model
model_name_or_path: acme/tiny-4b
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
deepspeed: configs/z2.json
### dataset
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 1024
packing: true
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 3.0
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
BASE = {"model_name_or_path": "m", "finetuning_type": "lora", "packing": True, "bf16": True}


def factory(**keys: Any) -> Any:
    return llama_factory.read({**BASE, **keys}, "l.yaml")


def test_a_whole_file_and_the_ds_config_beside_its_repository(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    zero = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
    (tmp_path / "configs" / "z2.json").write_text(json.dumps(zero))
    (tmp_path / "examples").mkdir()
    path = tmp_path / "examples" / "sft.yaml"
    path.write_text(SFT)
    made = read_any(path)
    assert (made.kind, made.model, made.warnings) == ("llama-factory", "acme/tiny-4b", ())
    assert made.recipe == Recipe(
        lora=LoRA(rank=8, dropout=0),
        gradient_checkpointing=True,  # on unless disabled
        gradient_accumulation_steps=2,
        seq_len=1024,
        deepspeed=DeepSpeed(stage=2, reduce_bucket_size=int(5e8), overlap_comm=False),
    )
    assert made.options.data == "identity,alpaca_en_demo"
    assert (made.options.epochs, made.options.learning_rate) == (3, 1e-4)
    assert any(key.startswith("use_reentrant_gc") for key in made.quiet)


FULL = {"finetuning_type": "full"}
ZERO = {"deepspeed": {"zero_optimization": {"stage": 3}}}
PRECISIONS: dict[str, tuple[dict[str, Any], tuple[str, str, str | None]]] = {
    # What is trained is turned to fp32 (adapter.py, init_adapter).
    "full": (FULL, ("fp32", "bf16", None)),
    "pure": ({**FULL, "pure_bf16": True, "bf16": False}, ("bf16", "no", None)),
    "pure, with autocast": ({**FULL, "pure_bf16": True}, ("bf16", "bf16", None)),
    "full under an engine": ({**FULL, **ZERO}, ("bf16", "bf16", None)),
    "lora": ({}, ("bf16", "bf16", "fp32")),
    "lora, fp16": ({"bf16": False, "fp16": True}, ("fp16", "fp16", "fp32")),
    "lora, pure": ({"pure_bf16": True, "bf16": False}, ("bf16", "no", "bf16")),
}


@pytest.mark.parametrize("case", PRECISIONS)
def test_dtypes(case: str) -> None:
    keys, (dtype, precision, adapters) = PRECISIONS[case]
    recipe = factory(**keys).recipe
    assert (recipe.dtype, recipe.mixed_precision) == (dtype, precision)
    assert (recipe.lora and recipe.lora.dtype) == adapters


def test_quantization_and_attention() -> None:
    made = factory(quantization_bit=4, quantization_type="fp4", flash_attn="fa2")
    assert (made.recipe.quantization, made.recipe.double_quant) == ("fp4", True)
    assert made.recipe.attention == "flash_attention_2"
    assert "in 16 bits" in made.warnings[0]
    assert factory(quantization_bit=8).recipe.quantization == "int8"
    assert factory(flash_attn="disabled").recipe.attention == "eager"
    assert factory(disable_gradient_checkpointing=True).recipe.gradient_checkpointing is False
    assert factory().recipe.batch_size == 8  # TrainingArguments' own


def test_what_cannot_be_estimated() -> None:
    for keys, said in (
        ({"stage": "dpo"}, "stage dpo can't be estimated"),
        ({"finetuning_type": "freeze"}, "finetuning_type freeze can't be estimated"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_method hqq"),
        ({"fsdp": "full_shard"}, "fsdp can't be estimated"),
        ({"fp16": True}, "fp16 and bf16 are both true"),
    ):
        with pytest.raises(IllegalRecipe, match=said):
            factory(**keys)
    with pytest.raises(InvalidValue, match="quantization_bit is 3: it must be 4 or 8"):
        factory(quantization_bit=3)
    with pytest.raises(UnknownName, match="unknown flash_attn in l.yaml 'fa9'"):
        factory(flash_attn="fa9")
    with pytest.raises(UserError, match="l.yaml has no model_name_or_path"):
        llama_factory.read({"stage": "sft"}, "l.yaml")


@pytest.mark.parametrize("key", sorted(UNMODELLED))
def test_every_key_that_is_not_honoured_is_named(key: str) -> None:
    (warning,) = factory(**{key: True}).warnings
    assert warning == f"l.yaml: {key}: True is not honoured: {UNMODELLED[key]}"
    assert factory(**{key: False}).warnings == ()


def test_what_costs_no_memory_is_passed_over() -> None:
    assert not HARMLESS & UNMODELLED.keys()
    assert factory(**dict.fromkeys(HARMLESS - {"dataset"}, "x")).warnings == ()
    assert "unknown key 'lora_rnk'; nearest: 'lora_rank'" in factory(lora_rnk=8).warnings[0]


# --- TrainingArguments ------------------------------------------------------------------------


def test_what_trainer_itself_dumps(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        optim="adafactor",
        bf16=True,
        use_cpu=True,
        report_to="none",
        max_steps=7,
    )
    path = tmp_path / "training_args.json"
    path.write_text(arguments.to_json_string())
    made = read_any(path)
    assert (made.kind, made.model) == ("training-arguments", None)
    assert made.recipe == Recipe(
        batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        optimizer="adafactor",
    )
    assert made.options.max_steps == 7
    # Not one of its keys is unknown; it says nothing of the model, and that is told.
    (warning,) = made.warnings
    assert "say nothing of the model, the sequence length" in warning


def test_what_trl_itself_dumps(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=512, use_cpu=True, report_to="none", packing=True
    )
    path = tmp_path / "training_args.json"
    path.write_text(arguments.to_json_string())
    made = read_any(path)
    assert made.kind == "trl"
    assert not any("unknown key" in warning for warning in made.warnings)
    assert (made.recipe.seq_len, made.recipe.dtype) == (512, "fp32")


def test_defaults_of_transformers_and_of_trl() -> None:
    plain = training_arguments.read({"output_dir": "o"}, "t.json").recipe
    assert (plain.batch_size, plain.mixed_precision, plain.gradient_checkpointing) == (
        8,
        "no",
        False,
    )
    trl = training_arguments.read({"output_dir": "o", "packing": True}, "t.yaml").recipe
    assert (trl.dtype, trl.mixed_precision, trl.seq_len) == ("fp32", "bf16", 1024)
    assert trl.gradient_checkpointing is True


def test_trls_model_and_adapters(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model_name_or_path: acme/tiny\ndataset_name: acme/rows\ndtype: bfloat16\n"
        "attn_implementation: flash_attention_2\nload_in_4bit: true\nuse_bnb_nested_quant: true\n"
        "use_peft: true\nlora_r: 4\nlora_alpha: 8\nlora_target_modules: [q_proj, v_proj]\n"
        "max_length: 2048\npacking: true\nper_device_train_batch_size: 2\n"
    )
    made = read_any(path)
    assert (made.kind, made.model) == ("trl", "acme/tiny")
    assert made.recipe == Recipe(
        quantization="nf4",
        # TRL turns the adapters of quantized models to bf16.
        lora=LoRA(rank=4, alpha=8, target_modules=("q_proj", "v_proj"), dtype="bf16"),
        attention="flash_attention_2",
        gradient_checkpointing=True,
        batch_size=2,
    )
    assert [w.partition(": ")[2][:22] for w in made.warnings] == [
        "TRL computes its loss ",
        "TRL leaves embeddings,",
    ]


def test_what_a_trainer_does_besides_is_named() -> None:
    keys = {"output_dir": "o", "use_liger_kernel": True, "torch_compile": True, "optim": "adamv"}
    warnings = training_arguments.read(keys, "t.json").warnings
    for part in ("use_liger_kernel: True", "torch_compile: True", "nearest: 'adamw_torch"):
        assert any(part in warning for warning in warnings), (part, warnings)


# --- files ------------------------------------------------------------------------------------


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_ds_config(tmp_path: Path) -> None:
    text = json.dumps(
        {
            "zero_optimization": {"stage": 1},
            "fp16": {"enabled": False},
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": 4,
        }
    )
    made = read_any(written(tmp_path, "ds.json", text))
    assert (made.kind, made.model) == ("deepspeed", None)
    assert made.recipe.deepspeed is not None
    assert (made.recipe.deepspeed.stage, made.recipe.batch_size) == (1, 4)
    assert "says nothing of the model" in made.warnings[-1]


def test_recipes_and_plans_of_our_own(tmp_path: Path) -> None:
    recipe = Recipe(batch_size=3, lora=LoRA(rank=2))
    text = json.dumps(recipe.to_dict())
    assert read_any(written(tmp_path, "r.json", text)).recipe == recipe
    plan = {"schema": 1, "model": {"id": "acme/tiny"}, "recipe": recipe.to_dict()}
    made = read_any(written(tmp_path, "plan.json", json.dumps(plan)))
    assert (made.kind, made.model, made.recipe) == ("plan", "acme/tiny", recipe)
    plan["recipe"] = None
    with pytest.raises(UserError, match="plan.json has no recipe"):
        read_any(written(tmp_path, "plan.json", json.dumps(plan)))


@pytest.mark.parametrize("key", ["model_init_kwargs", "gradient_checkpointing_kwargs"])
def test_tables_may_be_json_in_a_text(tmp_path: Path, key: str) -> None:
    keys = {"model_name_or_path": "acme/tiny", "max_length": 64, "packing": True}
    read_any(written(tmp_path, "good.json", json.dumps({**keys, key: "{}"})))
    for odd in ("auto", 1, [1]):
        with pytest.raises(InvalidValue, match=f"{key} is .*: it must be a table"):
            read_any(written(tmp_path, "odd.json", json.dumps({**keys, key: odd})))


MALFORMED = {
    "a.yaml": ("base_model: [m\n", "a.yaml' is malformed, line 2: "),
    "b.yaml": ("- base_model\n", "holds no table of keys: an Axolotl YAML"),
    "c.yaml": ("", "holds no table of keys"),
    "d.yaml": ("apiVersion: v1\nkind: Pod\n", "is no file that is known: an Axolotl YAML"),
    "e.json": ('{"bf16": true,}', "e.json' is malformed: "),
    "f.json": ('{"hidden_size": 8, "model_type": "llama"}', "is no file that is known"),
    "g.toml": ("a = 1\n", "it must be a .yaml, .yml or .json file"),
    "h.yaml": ("base_model: !!python/object/apply:os.system ['true']\n", "h.yaml' is malformed"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    text, said = MALFORMED[name]
    with pytest.raises(UserError, match=said) as caught:
        read_any(written(tmp_path, name, text))
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't read .*No such file"):
        read_any(tmp_path / "a.yaml")
