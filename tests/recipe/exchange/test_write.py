"""Recipes as other tools' files: read back they are the same, and real classes take them."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vramplan import DeepSpeed, LoRA, Recipe
from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName, UserError
from vramplan.recipe.exchange import TARGETS, Options, export, read_any

LORAS = (
    None,
    LoRA(rank=8, alpha=16),
    LoRA(rank=4, alpha=12, dropout=0, target_modules=("q_proj", "mlp.down_proj"), dtype="bf16"),
)
OPTIONS = Options(data="rows.jsonl", learning_rate=1e-5, epochs=2, output="out", seed=7)


def recipes() -> Iterator[Recipe]:
    """Every legal combination of what the tools have words for."""
    for lora, quantization, dtype, precision, attention, zero in itertools.product(
        LORAS,
        (None, "nf4", "fp4", "int8"),
        ("bf16", "fp16", "fp32"),
        ("no", "bf16", "fp16"),
        ("sdpa", "eager", "flash_attention_2"),
        (None, DeepSpeed(stage=2)),
    ):
        try:
            yield Recipe(
                lora=lora,
                quantization=quantization,
                double_quant=quantization != "fp4",
                dtype=dtype,
                mixed_precision=precision,
                attention=attention,
                gradient_checkpointing=lora is not None,
                deepspeed=zero,
                world_size=1 if zero is None else 2,
                optimizer="adafactor" if lora is None else "adamw_torch_fused",
                batch_size=3,
                seq_len=777,
                gradient_accumulation_steps=5,
            )
        except UserError:
            continue


@pytest.mark.parametrize("target", ["axolotl", "llama-factory"])
def test_what_is_written_reads_back_the_same(tmp_path: Path, target: str) -> None:
    (tmp_path / "ds_config.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}})
    )
    written = 0
    for recipe in recipes():
        try:
            made = export(target, "acme/tiny", recipe, OPTIONS)
        except IllegalRecipe:  # the tool has no words for it
            continue
        if any("adapters are" in note for note in made.notes):
            continue  # said to be otherwise
        written += 1
        path = tmp_path / "run.yaml"
        path.write_text(made.text)
        back = read_any(path)
        assert (back.kind, back.model) == (target, "acme/tiny")
        ranks = recipe.world_size  # told on the command line that starts them
        expected = {**recipe.to_dict(), "deepspeed": None, "world_size": 1}
        assert {**back.recipe.to_dict(), "deepspeed": None} == expected
        assert (back.recipe.deepspeed is None) == (recipe.deepspeed is None)
        assert f"# On {ranks} GPUs." in made.text or ranks == 1
        assert not any("unknown key" in warning for warning in back.warnings)
        options = back.options
        assert (options.data, options.epochs, options.seed) == ("rows.jsonl", 2, 7)
        assert (options.learning_rate, options.output) == (1e-5, "out")
    assert written > 100


def test_what_a_tool_has_no_words_for() -> None:
    with pytest.raises(IllegalRecipe, match="Axolotl has no words for dtype 'fp32' with mixed_pre"):
        export("axolotl", "m", Recipe(dtype="fp32"))
    with pytest.raises(IllegalRecipe, match="LLaMA-Factory has no words for dtype 'fp32'"):
        export("llama-factory", "m", Recipe(dtype="fp32", lora=LoRA()))
    with pytest.raises(UnknownName, match="unknown target .*'axolotel'.*nearest: 'axolotl'"):
        export("axolotel", "m", Recipe())
    with pytest.raises(InvalidValue, match="learning_rate is 0: it must be more than 0"):
        Options(learning_rate=0)


@pytest.mark.parametrize("target", TARGETS)
def test_notes_are_in_the_file_too(target: str) -> None:
    made = export(target, "m", Recipe(lora=LoRA(), quantization="nf4"))
    if target in ("axolotl", "llama-factory", "trl"):
        assert made.notes
        assert all(note in made.text for note in made.notes)


def test_numbers_that_yaml_would_take_for_text(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    for rate in (2e-5, 1.5e-7, 0.0001, 3.0):
        text = export("axolotl", "m", Recipe(), Options(learning_rate=rate)).text
        assert yaml.safe_load(text)["learning_rate"] == rate


def test_names_that_yaml_would_take_for_something_else() -> None:
    yaml = pytest.importorskip("yaml")
    for name in ("no", "1e5", "a: b", "x # y", "ünï", 'a"b', "~"):
        made = export("axolotl", name, Recipe(), Options(data=name))
        found = yaml.safe_load(made.text)
        assert (found["base_model"], found["datasets"][0]["path"]) == (name, name)


# --- accelerate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (Recipe(), "NO"),
        (Recipe(world_size=4, mixed_precision="no"), "MULTI_GPU"),
        (Recipe(deepspeed=DeepSpeed(stage=3), world_size=4), "DEEPSPEED"),
    ],
    ids=["one", "ddp", "zero"],
)
def test_accelerate_takes_its_config(tmp_path: Path, recipe: Recipe, kind: str) -> None:
    config = pytest.importorskip("accelerate.commands.config.config_args")
    path = tmp_path / "a.yaml"
    path.write_text(export("accelerate", "m", recipe).text)
    made = config.load_config_from_file(str(path))
    assert made.distributed_type.name == kind
    assert made.num_processes == recipe.world_size
    if kind == "DEEPSPEED":
        assert made.deepspeed_config["zero3_init_flag"] is True
    else:
        assert made.mixed_precision == recipe.mixed_precision


def test_what_vramplan_config_writes_is_the_same() -> None:
    yaml = pytest.importorskip("yaml")
    files = pytest.importorskip("vramplan_launcher.deepspeed_files")
    recipe = Recipe(deepspeed=DeepSpeed(stage=3), world_size=4, gradient_checkpointing=True)
    mine = yaml.safe_load(export("accelerate", "m", recipe).text)
    assert mine == yaml.safe_load(files.accelerate_config(recipe))
    theirs = settings_of(files.training_arguments(recipe))
    for name, value in settings_of(export("training-arguments", "m", recipe).text).items():
        if name in theirs and name != "learning_rate":
            assert theirs[name] == value


# --- Python -----------------------------------------------------------------------------------

PYTHON = {
    "full": Recipe(optimizer="adafactor"),
    "lora": Recipe(
        lora=LoRA(target_modules=("q_proj",), dtype="bf16"), gradient_checkpointing=True
    ),
    "qlora": Recipe(lora=LoRA(), quantization="nf4", double_quant=False, batch_size=2),
    "int8": Recipe(lora=LoRA(), quantization="int8", dtype="fp16", mixed_precision="fp16"),
    "galore": Recipe(optimizer="galore_adamw", optim_rank=64, optim_target_modules=("mlp",)),
    "zero": Recipe(deepspeed=DeepSpeed(stage=2), world_size=2),
}


def settings_of(text: str) -> dict[str, Any]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SETTINGS":
            found: dict[str, Any] = ast.literal_eval(node.value)
            return found
    raise AssertionError("no SETTINGS")


@pytest.mark.parametrize("name", PYTHON)
def test_training_arguments_are_made_for_real(tmp_path: Path, name: str) -> None:
    recipe = PYTHON[name]
    text = export("training-arguments", "acme/tiny", recipe, OPTIONS).text
    compile(text, "script.py", "exec")
    settings = settings_of(text)
    deepspeed = settings.pop("deepspeed", None)
    assert deepspeed == (None if recipe.deepspeed is None else "ds_config.json")
    transformers = pytest.importorskip("transformers")
    # fp16 and GaLore want a GPU and a package only when training starts.
    made = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings
    )
    assert made.per_device_train_batch_size == recipe.batch_size
    assert made.gradient_checkpointing == recipe.gradient_checkpointing
    assert made.optim == recipe.optimizer
    assert (made.bf16, made.fp16) == (
        recipe.mixed_precision == "bf16",
        recipe.mixed_precision == "fp16",
    )
    assert (made.learning_rate, made.num_train_epochs, made.seed) == (1e-5, 2, 7)


@pytest.mark.parametrize("name", PYTHON)
def test_trls_config_is_made_for_real(tmp_path: Path, name: str) -> None:
    made = export("trl", "acme/tiny", PYTHON[name], OPTIONS)
    compile(made.text, "script.py", "exec")
    settings = settings_of(made.text)
    assert settings["max_length"] == PYTHON[name].seq_len
    trl = pytest.importorskip("trl")
    settings.pop("deepspeed", None)
    config = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert config.gradient_checkpointing == PYTHON[name].gradient_checkpointing


def test_names_are_quoted_as_python() -> None:
    for name in ("it's", 'a"b', "a\\b", "C:\\x"):
        text = export("training-arguments", name, Recipe(), Options(data=name)).text
        values = {
            ast.unparse(node.targets[0]): node.value
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign)
        }
        assert ast.literal_eval(values["MODEL"]) == ast.literal_eval(values["DATA"]) == name


def tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_the_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("peft")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    tiny_model(model)
    data.write_text('{"text": "a b a b a b a"}\n' * 4)
    recipe = Recipe(
        lora=LoRA(rank=2, target_modules=("q_proj",)), gradient_checkpointing=True, seq_len=8
    )
    options = Options(data=str(data), max_steps=1, output=str(tmp_path / "out"))
    text = export("training-arguments", str(model), recipe, options).text
    script: dict[str, Any] = {"__name__": "script"}
    exec(compile(text, "script.py", "exec"), script)
    script["main"](use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_adapters_are_cast_where_peft_makes_others() -> None:
    """peft gives adapters the weights' dtype, or fp32; on int8 weights fp32 alone."""
    cast = "parameter.data = parameter.data.to(torch.bfloat16)"
    lora = LoRA(dtype="bf16")
    for recipe, differs in (
        (Recipe(lora=lora), False),
        (Recipe(lora=lora, quantization="nf4"), False),
        (Recipe(lora=LoRA(), quantization="int8"), False),
        (Recipe(lora=lora, quantization="int8"), True),
        (Recipe(lora=lora, dtype="fp32"), True),
    ):
        written = export("training-arguments", "acme/tiny", recipe, OPTIONS).text
        assert (cast in written) == differs
