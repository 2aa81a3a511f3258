"""Sweeps: every combination, each as estimate() says."""

from __future__ import annotations

import csv
import io
import json

import pytest

from vramplan.errors import InvalidValue, UnknownName
from vramplan.memory.estimate import estimate
from vramplan.planner.sweep import parse_over, sweep, with_values
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

GPT2 = "openai-community/gpt2"


def test_every_combination_in_order() -> None:
    over = {"lora-rank": (8, 128), "seq": (256, 512)}
    found = sweep(GPT2, Recipe(lora=LoRA()), over, "24GB")
    assert [tuple(row.values.values()) for row in found.rows] == [
        (8, 256),
        (8, 512),
        (128, 256),
        (128, 512),
    ]
    for row in found.rows:
        recipe = Recipe(lora=LoRA(rank=row.values["lora_rank"]), seq_len=row.values["seq_len"])
        assert row.recipe == recipe
        assert row.required == estimate(GPT2, recipe, "24GB").required
        assert row.seconds is not None
        assert row.tokens_per_second == pytest.approx(recipe.seq_len / row.seconds)


def test_a_refused_row_keeps_the_reason() -> None:
    found = sweep(GPT2, Recipe(), {"seq_len": (1024, 2048), "quantization": (None, "nf4")})
    refused = [row for row in found.rows if row.recipe is None]
    assert len(refused) == 3  # beyond the positions, quantized without adapters, and both
    assert all(row.why for row in refused)
    assert found.rows[0].fits is None


def test_csv_and_json() -> None:
    found = sweep(GPT2, Recipe(seq_len=512), {"batch": (1, 2)}, "24GB")
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["batch_size"] for row in rows] == ["1", "2"]
    assert int(rows[0]["required"]) == found.rows[0].required
    assert "measured_peak" not in rows[0]
    assert json.loads(json.dumps(found.to_dict()))["over"] == {"batch_size": [1, 2]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seq=1k,4096", ("seq_len", (1024, 4096))),
        ("lora-rank=8, 128", ("lora_rank", (8, 128))),
        ("quantization=none,nf4", ("quantization", (None, "nf4"))),
        ("gradient_checkpointing=no,yes", ("gradient_checkpointing", (False, True))),
        ("zero=no,2,3", ("zero", (None, 2, 3))),
        ("lora-dropout=0,0.1", ("lora_dropout", (0.0, 0.1))),
        (
            "lora-targets=all-linear,q_proj+v_proj",
            ("lora_targets", ("all-linear", ("q_proj", "v_proj"))),
        ),
    ],
)
def test_what_over_means(text: str, expected: tuple) -> None:
    assert parse_over(text) == expected


@pytest.mark.parametrize("text", ["seq", "seq=", "seq=a", "lora-dropout=x", "double-quant=maybe"])
def test_a_malformed_over_is_named(text: str) -> None:
    with pytest.raises(InvalidValue):
        parse_over(text)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(UnknownName, match="nearest: 'seq-len'"):
        parse_over("seqlen=1")
    with pytest.raises(UnknownName, match="unknown optimizer"):
        sweep(GPT2, Recipe(), {"optimizer": ("adamv",)})


def test_values_of_adapters_and_zero() -> None:
    recipe = with_values(Recipe(), {"lora_rank": 4, "zero": 3, "offload_param": "cpu"})
    assert recipe.lora == LoRA(rank=4)
    assert recipe.deepspeed == DeepSpeed(stage=3, offload_param="cpu")
    assert with_values(recipe, {"zero": None}).deepspeed is None


def test_nothing_to_sweep_over() -> None:
    with pytest.raises(InvalidValue, match="combinations"):
        sweep(GPT2, Recipe(), {})
