"""What is written is what DeepSpeed's own parser reads, and what Trainer accepts: all of it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vramplan_launcher.deepspeed_config import Config, Hyperparameters, ds_config
from vramplan_launcher.deepspeed_files import accelerate_config, training_arguments

from vramplan.errors import IllegalRecipe, UserError
from vramplan.hardware.catalogue import parse_gpu
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import architecture
from vramplan.recipe import ds_keys
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.ds_config import read_ds_config
from vramplan.recipe.recipe import LoRA, Recipe

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")

CHILD = Path(__file__).with_name("deepspeed_parse.py")
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}
HYPER = Hyperparameters(learning_rate=3e-4, weight_decay=0.1, max_grad_norm=0.5)
LR = {"lr": 3e-4, "weight_decay": 0.1}
OPTIMIZERS: dict[str, tuple[str | None, dict[str, Any] | None]] = {
    "adamw_torch_fused": ("adamw", {**LR, "betas": [0.9, 0.999], "eps": 1e-8}),
    "adagrad": ("adagrad", LR),
    "sgd": (None, None),
}
CLUSTERS = ((0, 1, 1), (3, 16, 2))
"""Stage, GPUs and machines of an accelerate config."""
OFFLOADS = (None, "cpu", "nvme")


class Case(NamedTuple):
    config: Config
    auto: Config
    resized: bool

    def asked(self) -> list[dict[str, Any]]:
        """Both, for the child."""
        source: dict[str, Any] = {}
        text = training_arguments(self.config.recipe, HYPER)
        settings = text[text.index("SETTINGS = {") : text.index("}\n\n\ndef ") + 1]
        exec(settings, source)
        same = {
            "ranks": self.config.recipe.world_size,
            "settings": source["SETTINGS"],
            "hidden": TINY["hidden_size"],
        }
        return [{"values": c.values, **same} for c in (self.config, self.auto)]


def odd() -> list[dict[str, Any]]:
    """Configs with one value that can't be, or can, of every key that is honoured."""
    keys = {key for key in ds_keys.KNOWN if ds_keys.kind_of(key, 7) == "honoured"}
    found = []
    for key, stage in itertools.product(sorted(keys), (0, 1, 3)):
        for value in (None, True, False, 0, 1, -1, 1.5, 2e8, float("nan"), "x", [], [1], {"a": 1}):
            values: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
            }
            table = values
            *sections, last = key.split(".")
            for name in sections:
                table = table.setdefault(name, {})
            table[last] = value
            if values["train_micro_batch_size_per_gpu"] is not None:
                found.append(values)
    return found


def tiny() -> Architecture:
    return architecture(TINY)


def recipes() -> list[Recipe]:
    """Every stage, offload, precision, accumulation and number of ranks that is legal."""
    found = []
    for stage, optimizer, param, mixed in itertools.product(
        range(4), OFFLOADS, OFFLOADS, ("bf16", "fp16", "no")
    ):
        path = "/nvme" if "nvme" in (optimizer, param) else None
        for lora, steps, ranks, name in itertools.product(
            (None, LoRA(rank=4)), (1, 3), (1, 2, 1024), OPTIMIZERS
        ):
            try:
                zero = DeepSpeed(
                    stage=stage,  # type: ignore[arg-type]
                    offload_optimizer=optimizer,  # type: ignore[arg-type]
                    offload_param=param,  # type: ignore[arg-type]
                    nvme_path=path,
                    pin_memory=steps == 1,
                )
                recipe = Recipe(
                    deepspeed=zero,
                    dtype="fp32" if mixed == "no" else "bf16",
                    mixed_precision=mixed,  # type: ignore[arg-type]
                    lora=lora,
                    gradient_accumulation_steps=steps,
                    gradient_checkpointing=lora is None,
                    world_size=ranks,
                    optimizer=name,
                    batch_size=2,
                    seq_len=32,
                )
            except IllegalRecipe:
                continue
            found.append(recipe)
    return found


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    found = []
    for number, recipe in enumerate(recipes()):
        gpus = parse_gpu("24GB") if number % 2 else None
        try:
            config = ds_config(tiny(), recipe, gpus=gpus, hyper=HYPER)
            auto = ds_config(tiny(), recipe, gpus=gpus, hyper=HYPER, hf_auto=True)
        except IllegalRecipe:
            continue
        found.append(Case(config, auto, gpus is not None))
    return found


@pytest.fixture(scope="module")
def answers(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("accelerate")
    files = []
    for stage, ranks, machines in CLUSTERS:
        recipe = Recipe(deepspeed=DeepSpeed(stage=stage), world_size=ranks)  # type: ignore[arg-type]
        files.append(folder / f"{stage}.yaml")
        files[-1].write_text(accelerate_config(recipe, "a b/ds_config.json", machines))
    asked = {
        "cases": [asked for case in cases for asked in case.asked()],
        "accelerate": [str(path) for path in files],
        "odd": odd(),
    }
    done = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_the_whole_space_is_there(cases: list[Case]) -> None:
    zeros = [case.config.recipe.deepspeed for case in cases]
    seen = {(z.stage, z.offload_optimizer, z.offload_param) for z in zeros if z is not None}
    stage_3 = {(3, one, two) for one in OFFLOADS for two in OFFLOADS}
    assert seen == {(0, None, None), (1, None, None), (2, None, None), *stage_3} | {
        (1, "cpu", None),
        (2, "cpu", None),
    }
    assert {case.config.recipe.mixed_precision for case in cases} == {"bf16", "fp16", "no"}
    assert {case.config.recipe.lora is None for case in cases} == {True, False}


def test_deepspeed_reads_what_was_meant(cases: list[Case], answers: dict[str, Any]) -> None:
    for case, answer in zip(cases, answers["read"][::2], strict=True):
        recipe, read = case.config.recipe, answer["parsed"]
        assert read["batch_size"] == recipe.batch_size
        assert read["accumulation"] == recipe.gradient_accumulation_steps
        assert read["train_batch_size"] == (
            recipe.batch_size * recipe.gradient_accumulation_steps * recipe.world_size
        )
        assert read["clipping"] == 0.5
        assert (read["bf16"], read["fp16"]) == tuple(
            recipe.mixed_precision == name for name in ("bf16", "fp16")
        )
        name, params = OPTIMIZERS[recipe.optimizer]
        assert (read["optimizer"], read["params"]) == (name, params)
        written = case.config.values["zero_optimization"]
        for key, value in written.items():
            if isinstance(value, dict):
                assert {k: read["zero"][key][k] for k in value} == value
            else:
                assert read["zero"][key] == value, key


def test_reading_it_back_is_the_same_run(cases: list[Case]) -> None:
    for case in cases:
        read = read_ds_config(case.config.values)
        recipe = case.config.recipe
        assert read.deepspeed == recipe.deepspeed
        assert read.warnings == ()
        assert set(read.keys.values()) <= {"honoured", "no memory"}
        assert (read.batch_size, read.accumulation) == (
            recipe.batch_size,
            recipe.gradient_accumulation_steps,
        )
        assert read.precision == recipe.mixed_precision
        assert read.hyper["max_grad_norm"] == 0.5
        assert read_ds_config(case.auto.values).warnings == ()


def test_trainer_accepts_it_as_it_is(cases: list[Case], answers: dict[str, Any]) -> None:
    for case, answer in zip(cases, answers["read"][::2], strict=True):
        assert answer["filled"] == case.config.values


def test_transformers_fills_auto_with_the_same(cases: list[Case], answers: dict[str, Any]) -> None:
    for case, answer in zip(cases, answers["read"][1::2], strict=True):
        assert '"auto"' in json.dumps(case.auto.values)
        assert '"auto"' not in json.dumps(case.config.values)
        assert answer["filled"] == case.config.values


def test_every_key_that_deepspeed_reads_is_known(answers: dict[str, Any]) -> None:
    known = dict(answers["known"])
    assert set(known.pop("removed")) == ds_keys.REMOVED
    assert len(known[""]) > 40
    for section, keys in known.items():
        for key in keys:
            name = f"{section}.{key}" if section else key
            if name not in (*ds_keys.REMOVED, *ds_keys.OPEN, *ds_keys.SECTIONS):
                assert ds_keys.kind_of(name, 7) != "unknown", name


def test_accelerate_reads_its_config(answers: dict[str, Any]) -> None:
    for (stage, ranks, machines), found in zip(CLUSTERS, answers["accelerate"], strict=True):
        assert found["distributed_type"] == "DEEPSPEED"
        assert (found["num_processes"], found["num_machines"]) == (ranks, machines)
        settings = found["deepspeed_config"]
        assert settings["deepspeed_config_file"] == "a b/ds_config.json"
        assert settings["zero3_init_flag"] is (stage == 3)


def test_what_deepspeed_refuses_does_not_pass_unsaid(answers: dict[str, Any]) -> None:
    unsaid = []
    for values, accepted in zip(odd(), answers["odd"], strict=True):
        try:
            said = read_ds_config(values).warnings
        except UserError:
            continue
        if not accepted and not said:
            unsaid.append(values)
    assert unsaid == []
