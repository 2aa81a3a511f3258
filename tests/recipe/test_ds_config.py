"""Reading a user's ds_config.json: what is honoured, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.errors import IllegalRecipe, UserError
from vramplan.recipe import ds_keys
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.ds_config import only_what_counts, read_ds_config


def zero(**values: Any) -> dict[str, Any]:
    return {"zero_optimization": values}


def test_what_is_left_out_is_deepspeeds_default() -> None:
    found = read_ds_config(zero(stage=3)).deepspeed
    assert found.reduce_bucket_size == 500_000_000
    assert found.stage3_prefetch_bucket_size == 50_000_000
    assert found.stage3_param_persistence_threshold == 100_000
    assert found.overlap_comm is True
    assert read_ds_config(zero(stage=2)).deepspeed.overlap_comm is False  # None is stage == 3


def test_auto_stays_what_transformers_fills_in() -> None:
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
    found = read_ds_config(zero(stage=3, **dict.fromkeys(sizes, "auto"))).deepspeed
    assert found.sizes(64)["reduce_bucket"] == 64 * 64
    assert found.sizes(64)["prefetch_bucket"] == int(0.9 * 64 * 64)
    assert found.sizes(64)["persistence_threshold"] == 100_000  # not in the file


def test_numbers_as_people_write_them() -> None:
    found = read_ds_config(zero(stage=3.0, reduce_bucket_size=2e8, sub_group_size=1e9)).deepspeed
    assert found == DeepSpeed(
        stage=3,
        reduce_bucket_size=200_000_000,
        stage3_prefetch_bucket_size=50_000_000,
        stage3_param_persistence_threshold=100_000,
    )


def test_offload() -> None:
    found = read_ds_config(
        zero(
            stage=3,
            offload_optimizer={"device": "nvme", "nvme_path": "/nvme", "buffer_count": 6},
            offload_param={"device": "cpu", "pin_memory": False},
        )
    ).deepspeed
    assert (found.offload_optimizer, found.offload_param) == ("nvme", "cpu")
    assert (found.nvme_path, found.optimizer_buffer_count) == ("/nvme", 6)
    assert (found.pin_memory, found.pin_param_memory) == (True, False)
    none = read_ds_config(zero(stage=2, offload_optimizer={"device": "none", "pin_memory": False}))
    assert none.deepspeed == read_ds_config(zero(stage=2)).deepspeed
    assert read_ds_config(zero(stage=2, offload_optimizer=None)).deepspeed == none.deepspeed


def test_deprecated_words() -> None:
    found = read_ds_config(zero(stage=2, cpu_offload=True))
    assert found.deepspeed.offload_optimizer == "cpu"
    assert found.warnings == (
        "ds_config: zero_optimization.cpu_offload is deprecated: offload_optimizer replaces it",
    )
    assert read_ds_config({"zero_optimization": True}).deepspeed.stage == 1
    # pydantic takes a field by its own name as well
    assert read_ds_config(zero(stage=3, max_live_parameters=7)).deepspeed == (
        read_ds_config(zero(stage=3, stage3_max_live_parameters=7)).deepspeed
    )


def test_what_a_stage_ignores_changes_nothing() -> None:
    alike = read_ds_config(zero(stage=2, stage3_max_live_parameters=5, sub_group_size=3))
    assert alike.deepspeed == read_ds_config(zero(stage=2)).deepspeed
    assert only_what_counts(DeepSpeed(stage=0, reduce_bucket_size=9)) == DeepSpeed(stage=0)


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        ({}, None),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, "fp16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "no"),
        ({"bf16": {"enabled": False}}, None),
    ],
)
def test_precision(values: dict[str, Any], precision: str | None) -> None:
    assert read_ds_config({**zero(stage=2), **values}).precision == precision


@pytest.mark.parametrize(
    ("section", "optimizer"),
    [
        ({"type": "AdamW"}, "adamw_torch_fused"),
        ({"type": "Adam", "params": {"lr": "auto", "torch_adam": False}}, "adamw_torch_fused"),
        ({"type": "Lion"}, "lion_32bit"),
        ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, "sgd"),
        ({}, None),
    ],
)
def test_optimizer(section: dict[str, Any], optimizer: str | None) -> None:
    found = read_ds_config({**zero(stage=2), "optimizer": section})
    assert (found.optimizer, found.warnings) == (optimizer, ())


def test_hyperparameters() -> None:
    params = {"lr": 3e-4, "betas": [0.9, 0.95], "eps": "auto", "weight_decay": 0.1}
    found = read_ds_config(
        {
            **zero(stage=2),
            "gradient_clipping": 0.5,
            "optimizer": {"type": "AdamW", "params": params},
        }
    )
    assert found.hyper == {
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizr": {}}, "unknown key 'optimizr', which DeepSpeed ignores; nearest: 'optimizer'"),
        (
            zero(stage=2, overlap_com=True),
            "unknown key 'zero_optimization.overlap_com', which DeepSpeed refuses; "
            "nearest: 'zero_optimization.overlap_comm'",
        ),
        (zero(stage=3, zero_hpz_partition_size=8), "zero_hpz_partition_size = 8 changes memory"),
        (zero(stage=3, zero_quantized_weights=True), "zero_quantized_weights = True changes"),
        (
            {**zero(stage=2), "activation_checkpointing": {"partition_activations": True}},
            "activation_checkpointing has no effect",
        ),
        (
            {**zero(stage=2), "data_types": {"grad_accum_dtype": "fp32"}},
            "data_types changes memory",
        ),
        (
            zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.3}),
            "offload_optimizer.ratio = 0.3 changes memory",
        ),
        ({**zero(stage=2), "optimizer": {"type": "Lamb"}}, "Lamb is not modelled: estimated as"),
        ({}, "no zero_optimization"),
    ],
)
def test_warnings(values: dict[str, Any], said: str) -> None:
    warnings = read_ds_config({"zero_optimization": {"stage": 2}, **values} if values else {})
    assert [said in text for text in warnings.warnings] == [True]


def test_settings_that_ask_for_nothing_are_not_warned_about() -> None:
    values = {
        **zero(stage=3, zero_hpz_partition_size=1, zero_quantized_weights=False, zenflow=None),
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "flops_profiler": {"enabled": False},
        "steps_per_print": 2000,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    assert read_ds_config(values).warnings == ()


def test_every_key_has_its_class() -> None:
    found = read_ds_config({**zero(stage=2, leaf_module={"classes": ["X"]}), "wandb": {}, "x": 1})
    assert found.keys == {
        "zero_optimization.stage": "honoured",
        "zero_optimization.leaf_module": "not modelled",
        "wandb": "no memory",
        "x": "unknown",
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (zero(stage=4), "stage is 4"),
        (zero(stage="two"), "stage is 'two'"),
        (zero(stage=2, overlap_comm="yes"), "overlap_comm is 'yes'"),
        (zero(stage=2, reduce_bucket_size=0.5), "reduce_bucket_size is 0.5"),
        (zero(stage=2, offload_param={"device": "cpu"}), "Use stage 3"),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "offloads from stage 1"),
        (zero(stage=3, offload_optimizer={"device": "gpu"}), "'gpu'"),
        (zero(stage=2, offload_optimizer="cpu"), "a table of settings"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
        ({"train_micro_batch_size_per_gpu": "many"}, "is 'many'"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled is 1"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1"),
        (zero(stage=2, reduce_bucket_size=0), "reduce_bucket_size is 0"),
        (zero(stage=2, reduce_scatter=None), "reduce_scatter is None"),
        (zero(stage=1, legacy_stage1=True), "legacy_stage1: DeepSpeed has taken it out"),
        ({"optimizer": {"type": "Adam", "params": {"betas": ["x", 1]}}}, "betas is 'x'"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "betas is 0.9"),
        ({"optimizer": {"type": "OneBitAdam"}}, "unknown optimizer.type"),
        ({"amp": {"enabled": True}}, "amp: DeepSpeed 0.19 has removed this"),
        (zero(stage=3, mics_shard_size=8), "mics_shard_size: DeepSpeed 0.19 has removed"),
    ],
)
def test_what_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_ds_config(values)
    assert "ds_config" in str(error.value)


def test_two_precisions() -> None:
    both = {"bf16": {"enabled": True}, "fp16": {"enabled": True}}
    with pytest.raises(IllegalRecipe, match="cannot be simultaneously enabled"):
        read_ds_config({**zero(stage=2), **both})
    auto = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}
    assert read_ds_config({**zero(stage=2), **auto}).precision == "fp16"


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    values = zero(stage=2, reduce_bucket_size="auto")
    file.write_text(json.dumps(values), encoding="utf-8-sig")
    assert read_ds_config(file).warnings == ()
    file.write_text('{"zero_optimization": {"stage": 2,}, // two\n}')
    assert read_ds_config(file).warnings == (
        "ds.json: it has comments or trailing commas: DeepSpeed reads it (hjson), transformers and "
        "accelerate refuse it (json)",
    )
    with pytest.raises(UserError, match="can't read DeepSpeed config .*nowhere"):
        read_ds_config(tmp_path / "nowhere.json")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="ds.json.* malformed"):
        read_ds_config(file)


def test_another_stage() -> None:
    assert (
        read_ds_config(zero(stage=2), stage=3).deepspeed == read_ds_config(zero(stage=3)).deepspeed
    )


def refusal(values: dict[str, Any]) -> str | None:
    try:
        read_ds_config(values)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", sorted({*ds_keys.KNOWN, "optimizer.params.betas"}))
def test_no_value_of_any_key_is_a_traceback(key: str) -> None:
    odd = (None, True, 0, -1, 1.5, 1e400, float("nan"), "auto", "x", "", [], [1], {}, {"a": 1})
    for value in odd:
        for stage in (2, 3):
            values: dict[str, Any] = zero(stage=stage)
            *sections, last = key.split(".")
            table = values
            for name in sections:
                table = table.setdefault(name, {})
            table[last] = value
            said = refusal(values)
            assert said is None or "ds_config" in said
