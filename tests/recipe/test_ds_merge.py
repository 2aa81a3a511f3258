"""A ds_config.json with options and a recipe file: which wins, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import IllegalRecipe, UserError
from vramplan.recipe.ds_merge import merged

BATCH = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
}


def merge(
    tmp_path: Path,
    config: dict[str, Any],
    chosen: dict[str, Any] | None = None,
    values: dict[str, Any] | None = None,
    cards: int | None = None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **config}))
    return merged(file, values or {}, chosen or {}, cards)


def test_the_file_fills_the_recipe(tmp_path: Path) -> None:
    config = {**BATCH, "fp16": {"enabled": True}, "optimizer": {"type": "Adagrad"}}
    values, warnings = merge(tmp_path, config)
    assert values.pop("deepspeed")["stage"] == 2
    assert values == {
        "batch_size": 2,
        "gradient_accumulation_steps": 4,
        "mixed_precision": "fp16",
        "optimizer": "adagrad",
        "world_size": 8,  # 64 / (2 * 4)
    }
    assert warnings == ("ds.json: train_batch_size 64 = 2 x 4 x 8 GPUs",)


def test_auto_is_left_to_the_options(tmp_path: Path) -> None:
    auto = dict.fromkeys(BATCH, "auto")
    values, warnings = merge(tmp_path, {**auto, "bf16": {"enabled": "auto"}}, {"batch_size": 3})
    assert set(values) == {"deepspeed"}
    assert warnings == ()


def test_options_win_and_it_is_said(tmp_path: Path) -> None:
    chosen = {"batch_size": 1, "mixed_precision": "fp16", "zero": "3", "offload_param": "cpu"}
    config = {**BATCH, "bf16": {"enabled": True}}
    values, warnings = merge(tmp_path, config, chosen)
    assert "batch_size" not in values
    assert "mixed_precision" not in values
    assert values["deepspeed"]["stage"] == 3
    assert values["deepspeed"]["overlap_comm"] is True  # stage 3's default, not stage 2's
    text = "\n".join(warnings)
    assert "--zero 3 overrides zero_optimization.stage 2" in text
    assert "--offload-param cpu overrides zero_optimization.offload_param none" in text
    assert "--batch-size 1 overrides train_micro_batch_size_per_gpu (2); Trainer would" in text
    assert "--mixed-precision fp16 overrides bf16 and fp16 (bf16)" in text
    assert "train_batch_size 64 is left aside" in text


def test_the_same_twice_is_no_contradiction(tmp_path: Path) -> None:
    chosen = {"batch_size": 2, "optimizer": "adamw_torch", "zero": "2", "world_size": 8}
    config = {**BATCH, "optimizer": {"type": "AdamW"}}
    values, warnings = merge(tmp_path, config, chosen)
    assert warnings == ()
    assert "optimizer" not in values


def test_a_recipe_file_gives_way(tmp_path: Path) -> None:
    recipe = {"batch_size": 7, "seq_len": 99, "deepspeed": {"stage": 1}, "world_size": 8}
    values, warnings = merge(tmp_path, BATCH, values=recipe)
    assert (values["batch_size"], values["seq_len"], values["deepspeed"]["stage"]) == (2, 99, 2)
    text = "\n".join(warnings)
    assert "replace the recipe file's deepspeed" in text
    assert "train_micro_batch_size_per_gpu (2) replaces batch_size 7 of the recipe file" in text


@pytest.mark.parametrize(
    ("chosen", "cards", "product"),
    [({"world_size": 4}, None, "= 32: DeepSpeed refuses"), ({}, 2, "x 2 (GPUs) = 16: DeepSpeed")],
)
def test_batches_that_contradict(
    chosen: dict[str, Any], cards: int | None, product: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        merge(tmp_path, BATCH, chosen, cards=cards)
    assert "train_batch_size is 64, but 2 (train_micro_batch_size_per_gpu) x 4" in str(error.value)
    assert product in str(error.value)


def test_a_batch_that_no_number_of_gpus_makes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="= 8 does not divide it: DeepSpeed refuses"):
        merge(tmp_path, {**BATCH, "train_batch_size": 30})
    with pytest.raises(UserError, match=r"train_batch_size is 7, but 1 .* = 8: DeepSpeed refuses"):
        merge(tmp_path, {"train_batch_size": 7}, cards=8)


def test_one_card_is_a_kind_of_card(tmp_path: Path) -> None:
    assert merge(tmp_path, BATCH, cards=1)[0]["world_size"] == 8


def test_no_zero_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(IllegalRecipe, match="--zero no and --deepspeed contradict"):
        merge(tmp_path, BATCH, {"zero": "no"})
