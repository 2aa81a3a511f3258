"""Goals: what may be decided, and which decisions contradict each other."""

from __future__ import annotations

import json

import pytest

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName
from vramplan.planner.goal import METHODS, Goal, method_of
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe


def test_all_methods_are_considered_unless_one_is_named() -> None:
    assert Goal().considered == METHODS == ("full", "lora", "int8", "qlora")
    assert Goal(methods=("qlora", "full")).considered == ("full", "qlora")


def test_a_pinned_quantization_chooses_the_method() -> None:
    assert Goal(pins={"quantization": "nf4"}).considered == ("qlora",)
    assert Goal(pins={"quantization": "int8"}).considered == ("int8",)
    assert Goal(pins={"quantization": None}).considered == ("full", "lora")


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        (Recipe(), "full"),
        (Recipe(lora=LoRA()), "lora"),
        (Recipe(lora=LoRA(), quantization="int8"), "int8"),
        (Recipe(lora=LoRA(), quantization="fp4"), "qlora"),
    ],
)
def test_the_method_of_a_recipe(recipe: Recipe, method: str) -> None:
    assert method_of(recipe) == method


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"methods": ("dora",)}, UnknownName, "unknown method 'dora'"),
        ({"methods": ()}, InvalidValue, "one or more of full"),
        ({"seq_len": 0}, InvalidValue, "seq_len is 0"),
        ({"effective_batch": True}, InvalidValue, "effective_batch is True"),
        ({"tokens": -1}, InvalidValue, "tokens is -1"),
        ({"price": -0.5}, InvalidValue, "price is -0.5"),
        ({"price": float("nan")}, InvalidValue, "price is nan"),
        ({"objective": "speed"}, UnknownName, "unknown objective 'speed'"),
        ({"pins": {"optimiser": "sgd"}}, UnknownName, "nearest: 'optimizer'"),
        ({"pins": {"optimizer": "adamv"}}, UnknownName, "unknown optimizer 'adamv'"),
        ({"pins": {"dtype": "bf17"}}, UnknownName, "unknown dtype"),
        ({"pins": {"zero": 4}}, InvalidValue, "deepspeed.stage is 4"),
        ({"pins": {"offload_param": "disk"}}, UnknownName, "offload_param"),
        ({"lora": {"rank": 0}}, InvalidValue, "lora.rank is 0"),
    ],
)
def test_wrong_values_are_named(fields: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Goal(**fields)


@pytest.mark.parametrize("name", ["methods", "pins", "lora", "allow_8bit_optim", "host_memory"])
def test_a_value_of_another_type(name: str) -> None:
    with pytest.raises(InvalidValue, match=f"^{name} is 1.5"):
        Goal(**{name: 1.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "one", "other"),
    [
        ({"methods": ("full",), "pins": {"quantization": "nf4"}}, "method full", "nf4"),
        ({"effective_batch": 16, "pins": {"batch_size": 3}}, "batch_size 3", "batch 16"),
        (
            {
                "effective_batch": 16,
                "pins": {"batch_size": 4, "gradient_accumulation_steps": 2, "world_size": 1},
            },
            "batch_size 4 x gradient_accumulation_steps 2 x world_size 1",
            "effective batch 16",
        ),
        ({"pins": {"zero": None, "offload_optimizer": "cpu"}}, "no ZeRO", "offload_optimizer cpu"),
        ({"pins": {"zero": 2, "offload_param": "cpu"}}, "ZeRO stage 2", "offload_param cpu"),
        ({"pins": {"zero": 3, "deepspeed": DeepSpeed()}}, "deepspeed", "zero"),
    ],
)
def test_contradictions_name_both(fields: dict, one: str, other: str) -> None:
    with pytest.raises(IllegalRecipe) as caught:
        Goal(**fields)
    assert f"{one} and " in str(caught.value)
    assert other in str(caught.value)


def test_a_goal_goes_through_json_and_back() -> None:
    goal = Goal(
        methods=("lora",),
        seq_len=512,
        lora={"rank": 8, "dropout": 0.0},
        pins={"deepspeed": DeepSpeed(stage=3), "world_size": 2},
        price=1.5,
        host_memory=2**36,
    )
    assert Goal.from_dict(json.loads(json.dumps(goal.to_dict()))) == goal
    with pytest.raises(UnknownName, match="goal field"):
        Goal.from_dict({"tokns": 1})
