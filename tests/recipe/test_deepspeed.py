from __future__ import annotations

import json
from typing import Any

import pytest

from vramplan.errors import IllegalRecipe, InvalidValue, UnknownName
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe


def test_auto_is_what_transformers_fills_in() -> None:
    assert DeepSpeed(stage=3).sizes(4096) == {
        "reduce_bucket": 4096 * 4096,
        "prefetch_bucket": 15_099_494,  # int(0.9 * 4096 * 4096)
        "persistence_threshold": 10 * 4096,
    }
    assert DeepSpeed(reduce_bucket_size=7).sizes(4096)["reduce_bucket"] == 7


def test_round_trip() -> None:
    zero = DeepSpeed(stage=3, offload_param="cpu", sub_group_size=10)
    assert DeepSpeed.from_dict(json.loads(json.dumps(zero.to_dict()))) == zero
    recipe = Recipe(deepspeed=zero, world_size=4)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("stage", [4, -1, "2", True, None, 2.0])
def test_stage(stage: Any) -> None:
    with pytest.raises(InvalidValue, match="^deepspeed.stage is .* 0, 1, 2 or 3"):
        DeepSpeed(stage=stage)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stage": 0, "offload_optimizer": "cpu"}, "stage 1"),
        ({"stage": 2, "offload_optimizer": "nvme"}, "stage 3"),
        ({"stage": 2, "offload_param": "cpu"}, "stage 3"),
    ],
)
def test_offload_that_a_stage_ignores(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(IllegalRecipe, match=said):
        DeepSpeed(**fields)


def test_malformed_values() -> None:
    with pytest.raises(UnknownName, match="nearest: 'cpu'|'cpu'"):
        DeepSpeed(stage=3, offload_param="cup")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match='reduce_bucket_size .*"auto"'):
        DeepSpeed(reduce_bucket_size="all")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="sub_group_size"):
        DeepSpeed(sub_group_size=1e9)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="overlap_comm"):
        DeepSpeed(overlap_comm=1)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="reduce_bucket_size"):
        DeepSpeed.from_dict({"reduce_bucket": 1})


def test_combinations_that_are_not_described() -> None:
    with pytest.raises(IllegalRecipe, match="mixed_precision 'no'"):
        Recipe(deepspeed=DeepSpeed(), mixed_precision="no")
    assert Recipe(
        deepspeed=DeepSpeed(), mixed_precision="fp16"
    )  # no torch scaler: masters are fp32


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_quantized_weights_train_in_every_stage(quantization: Any, stage: int) -> None:
    """Measured: bitsandbytes' packed weights are partitioned as bytes in stage 3."""
    assert Recipe(deepspeed=DeepSpeed(stage=stage), quantization=quantization, lora=LoRA())


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_nvme_needs_a_path(name: str) -> None:
    with pytest.raises(IllegalRecipe, match=rf"^deepspeed\.{name} 'nvme' without a path"):
        DeepSpeed.from_dict({"stage": 3, name: "nvme"})
    with pytest.raises(InvalidValue, match="nvme_path"):
        DeepSpeed.from_dict({"stage": 3, name: "nvme", "nvme_path": ""})
    assert DeepSpeed.from_dict({"stage": 3, name: "nvme", "nvme_path": "/nvme"})


def test_states_on_nvme_need_a_buffer_each() -> None:
    fields = {"stage": 3, "offload_optimizer": "nvme", "nvme_path": "/nvme"}
    with pytest.raises(IllegalRecipe, match="optimizer_buffer_count 3 .* Use at least 4"):
        DeepSpeed.from_dict({**fields, "optimizer_buffer_count": 3})


def test_pinning_of_weights_has_its_own_switch() -> None:
    assert DeepSpeed(pin_param_memory=False).pin_param_memory is False
    with pytest.raises(InvalidValue, match="pin_param_memory .* True, False or None"):
        DeepSpeed(pin_param_memory=1)  # type: ignore[arg-type]
