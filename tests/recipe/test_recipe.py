from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
from typing import Any

import pytest

from vramplan.errors import InvalidValue, UnknownName, UserError
from vramplan.recipe import DeepSpeed, LoRA, Recipe


def test_defaults() -> None:
    assert Recipe().to_dict() == {
        "dtype": "bf16",
        "mixed_precision": "bf16",
        "quantization": None,
        "double_quant": True,
        "lora": None,
        "attention": "sdpa",
        "gradient_checkpointing": False,
        "optimizer": "adamw_torch_fused",
        "optim_target_modules": "all-linear",
        "optim_rank": 128,
        "batch_size": 1,
        "seq_len": 2048,
        "gradient_accumulation_steps": 1,
        "deepspeed": None,
        "world_size": 1,
        "allocator": "expandable_segments",
    }
    assert LoRA().to_dict() == {
        "rank": 16,
        "alpha": None,
        "dropout": 0.05,
        "target_modules": "all-linear",
        "dtype": "fp32",
    }


def test_frozen_hashable_and_keyword_only() -> None:
    recipe = Recipe(lora=LoRA(target_modules=["q_proj", "v_proj"]))
    assert hash(recipe) == hash(Recipe(lora=LoRA(target_modules=("q_proj", "v_proj"))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.batch_size = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Recipe("bf16")  # type: ignore[misc]


def test_every_field_has_a_docstring() -> None:
    for cls in (Recipe, LoRA):
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(following, ast.Expr), ast.unparse(statement)


@pytest.mark.parametrize("field", ["batch_size", "seq_len", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, math.inf])
def test_sizes_are_integers_of_at_least_one(field: str, value: object) -> None:
    with pytest.raises(InvalidValue) as caught:
        Recipe(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"{field} is {value!r}: it must be an integer of at least 1"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "bf61", "unknown dtype 'bf61': allowed are fp32, bf16, fp16; nearest: 'bf16'"),
        ("dtype", "bfloat16", "nearest: 'bf16'"),
        ("dtype", "torch.float16", "nearest: 'fp16'"),
        ("dtype", None, "unknown dtype None: allowed are fp32, bf16, fp16"),
        ("mixed_precision", "none", "allowed are no, bf16, fp16; nearest: 'no'"),
        ("mixed_precision", "fp32", "unknown mixed_precision 'fp32'"),
        ("quantization", "4bit", "allowed are int8, nf4, fp4; nearest: 'nf4'"),
        ("quantization", ["nf4"], "unknown quantization ['nf4']"),
        ("attention", "flash", "nearest: 'flash_attention_2'"),
        ("attention", "spda", "allowed are eager, sdpa, flash_attention_2; nearest: 'sdpa'"),
        ("allocator", "expandable", "nearest: 'expandable_segments'"),
        ("optimizer", "adamv", "nearest: 'adamw_torch_fused'"),
    ],
)
def test_names_are_of_their_lists(field: str, value: object, message: str) -> None:
    with pytest.raises(UnknownName) as caught:
        Recipe(**{field: value})  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["gradient_checkpointing", "double_quant"])
@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_flags_are_flags(field: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=f"^{field} is .*: it must be True or False$"):
        Recipe(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 3, ["adamw_torch"]])
def test_an_optimizer_is_a_name(value: object) -> None:
    with pytest.raises(InvalidValue, match="^optimizer is "):
        Recipe(optimizer=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "lora.rank is 0: it must be an integer of at least 1"),
        ({"rank": 8.0}, "lora.rank is 8.0"),
        ({"rank": True}, "lora.rank is True"),
        ({"alpha": 0}, "lora.alpha is 0: it must be a number above 0"),
        ({"alpha": "16"}, "lora.alpha is '16'"),
        ({"alpha": float("inf")}, "lora.alpha is inf: it must be a number above 0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0: it must be a number from 0 to less than 1"),
        ({"dropout": -0.1}, "lora.dropout is -0.1"),
        ({"dropout": math.nan}, "lora.dropout is nan"),
        ({"dropout": False}, "lora.dropout is False"),
        ({"dtype": "fp8"}, "unknown lora.dtype 'fp8': allowed are fp32, bf16, fp16"),
        ({"target_modules": []}, "lora.target_modules is []: it must be 'all-linear' or module"),
        ({"target_modules": None}, "lora.target_modules is None"),
        ({"target_modules": ["q_proj", 3]}, "lora.target_modules is 3"),
        ({"target_modules": ""}, "lora.target_modules is ''"),
        ({"target_modules": "(q|v)_proj"}, "lora.target_modules is '(q|v)_proj'"),
        ({"target_modules": ["all-linear"]}, "lora.target_modules is 'all-linear'"),
        ({"target_modules": {"q_proj": 1}}, "lora.target_modules is {'q_proj': 1}"),
    ],
)
def test_lora_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        LoRA(**values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("all-linear", "all-linear"),
        ("ALL_LINEAR", "all-linear"),
        ("q_proj", ("q_proj",)),
        (["v_proj", "q_proj", "v_proj"], ("q_proj", "v_proj")),
        ({"q_proj"}, ("q_proj",)),
        (("mlp.down_proj", "layers.0.q_proj"), ("layers.0.q_proj", "mlp.down_proj")),
    ],
)
def test_targets_are_kept_in_one_form(given: Any, kept: str | tuple[str, ...]) -> None:
    assert LoRA(target_modules=given).target_modules == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (True, LoRA()),
        (False, None),
        ({}, LoRA()),
        ({"rank": 8, "target_modules": ["q_proj"]}, LoRA(rank=8, target_modules=("q_proj",))),
    ],
)
def test_lora_in_other_forms(given: Any, kept: LoRA | None) -> None:
    assert Recipe(lora=given).lora == kept


@pytest.mark.parametrize("given", [16, "all-linear", ["q_proj"]])
def test_lora_in_no_form(given: Any) -> None:
    with pytest.raises(InvalidValue, match=r"^lora is .*: it must be None, or LoRA\(rank=…, …\)$"):
        Recipe(lora=given)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(lora=LoRA(target_modules=["q_proj", "v_proj"], alpha=32), quantization="nf4"),
        Recipe(dtype="fp32", mixed_precision="fp16", optimizer="adafactor", batch_size=7),
    ],
)
def test_there_and_back_through_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_sise": 2}, "unknown recipe field 'batch_sise'"),
        ({"batch_sise": 2}, "nearest: 'batch_size'"),
        ({"per_device_train_batch_size": 2}, "nearest: 'batch_size'"),
        ({"optim": "sgd"}, "nearest: 'optimizer'"),
        ({"attn_implementation": "sdpa"}, "nearest: 'attention'"),
        ({"bf16": True}, "nearest: 'mixed_precision'"),
        ({"lora": {"r": 8}}, "unknown LoRA field 'r': allowed are rank, alpha, dropout"),
        ({"lora": {"r": 8}}, "nearest: 'rank'"),
        ({"lora": {"lora_dropout": 0.1}}, "nearest: 'dropout'"),
        ({7: 1}, "unknown recipe field 7"),
    ],
)
def test_from_dict_names_an_unknown_key(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(UnknownName) as caught:
        Recipe.from_dict(values)
    assert message in str(caught.value)


def test_from_dict_wants_a_table() -> None:
    with pytest.raises(InvalidValue, match="^Recipe is .* a table of fields and their values$"):
        Recipe.from_dict([("batch_size", 1)])  # type: ignore[arg-type]


def test_several_gpus() -> None:
    assert Recipe(world_size=2).deepspeed is None  # torch's DDP
    assert Recipe(world_size=2, deepspeed={"stage": 2}).deepspeed == DeepSpeed(stage=2)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="^world_size is 0: it must be an integer of at least 1"):
        Recipe(world_size=0)
