"""DDP and ZeRO's stages side by side: `--compare-zero`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli.main import main
from vramplan.errors import IllegalRecipe, UnknownName
from vramplan.hardware.uneven import parse_cards, smallest_of
from vramplan.memory.estimate import estimate
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.reports.text import Look
from vramplan.reports.zero_ways import show_ways, ways_of, ways_to_dict

SMALL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def test_each_way_is_an_estimate_of_the_same_run() -> None:
    recipe = Recipe(world_size=8, seq_len=512, deepspeed=DeepSpeed(reduce_bucket_size=1000))
    needed = estimate(SMALL, recipe, "8xh100-80gb")
    ways = {way.name: way for way in ways_of(needed)}
    assert list(ways)[:2] == ["DDP", "ZeRO 0"]
    for way in ways.values():
        assert way.needed is not None
        assert way.needed.recipe.seq_len == 512
        if way.deepspeed is not None:
            assert way.deepspeed.reduce_bucket_size == 1000
    assert ways["DDP"].deepspeed is None
    again = estimate(SMALL, recipe)
    assert ways["ZeRO 2"].needed is not None
    assert ways["ZeRO 2"].needed.peak_allocated == again.peak_allocated
    assert ways["ZeRO 3, all on NVMe"].host is not None
    assert ways["ZeRO 3, all on NVMe"].host.nvme > 0


def test_partitions_and_offloading_save() -> None:
    needed = estimate(SMALL, Recipe(world_size=8, seq_len=128))
    required = {w.name: w.needed.required for w in ways_of(needed) if w.needed is not None}
    assert required["ZeRO 1"] < required["DDP"] < required["ZeRO 0"]
    assert required["ZeRO 1, optimizer on CPU"] <= required["ZeRO 1"]


def test_what_is_refused_says_why() -> None:
    needed = estimate(SMALL, Recipe(mixed_precision="no", world_size=2, seq_len=128))
    ways = ways_of(needed)
    assert ways[0].needed is not None
    assert all("mixed_precision 'no'" in way.refused for way in ways[1:])
    shown = show_ways(needed, ways, Look())
    flat = " ".join(shown.split())
    assert flat.count("deepspeed with dtype 'bf16' and mixed_precision 'no'") == 1
    assert shown.count("refused") == len(ways) - 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_names_a_node(width: int) -> None:
    recipe = Recipe(world_size=16, lora=LoRA(), seq_len=128)
    needed = estimate(SMALL, recipe, "8xh100-80gb")
    shown = show_ways(needed, ways_of(needed), Look(width=width))
    assert "each of 16 ranks" in shown
    assert "host x 8" in shown
    assert all(len(line) <= max(width, 80) for line in shown.splitlines())
    document = ways_to_dict(needed, ways_of(needed))
    assert document["ranks_of_a_node"] == 8
    row = next(w for w in document["ways"] if w["name"] == "ZeRO 2, optimizer on CPU")
    assert row["node"]["pinned"] == 8 * row["host"]["pinned"] > 0
    assert json.loads(json.dumps(document))["ways"] == document["ways"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return str(tmp_path)


def test_on_the_command_line(model: str, capsys: Any) -> None:
    asked = ["estimate", model, "--gpu", "8xH100-80GB", "--compare-zero", "--seq-len", "512"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "each of 8 ranks" in text
    assert "DDP" in text
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [way["fits"] for way in document["ways"]] == [True] * 10
    assert document["recipe"]["world_size"] == 8


def test_the_host_is_shown_beside_a_rank(model: str, capsys: Any) -> None:
    asked = ("--gpu", "8xH100-80GB", "--zero", "3", "--offload-optimizer", "cpu")
    assert main(["estimate", model, *asked, "--seq-len", "512"]) == 0
    text = capsys.readouterr().out
    assert "Host, a rank:" in text
    assert "all 8 ranks:" in text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--zero", "4"), "deepspeed.stage is 4: it must be 0, 1, 2 or 3"),
        (("--zero", "0", "--offload-optimizer", "cpu"), "stage 0: DeepSpeed offloads from stage 1"),
        (("--zero", "2", "--offload-param", "cpu"), "in stage 3 alone"),
        (("--zero", "2", "--offload-optimizer", "nvme"), "only stage 3 swaps states to NVMe"),
        (("--zero", "3", "--offload-optimizer", "nvme"), "'nvme' without a path"),
        (("--zero", "3", "--offload-param", "nvme"), "'nvme' without a path"),
        (("--zero", "3", "--offload-param", "cup"), "nearest: 'cpu'"),
        (("--offload-optimizer", "cpu"), "--offload-optimizer without ZeRO"),
        (("--nvme-path", "/nvme"), "--nvme-path without ZeRO"),
        (("--zero", "2", "--mixed-precision", "no"), "DeepSpeed's engine is then fp32"),
        (("--world-size", "0"), "world_size"),
        (("--world-size", "2", "--via", "trace"), "without DDP"),
        (("--compare-zero", "--via", "trace"), "--compare-zero needs the rules"),
    ],
)
def test_bad_input_is_refused_with_its_reason(
    model: str, asked: tuple[str, ...], said: str, capsys: Any
) -> None:
    assert main(["estimate", model, *asked]) == 2
    shown = capsys.readouterr()
    assert said in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


def test_a_pool_that_no_weight_fits_in() -> None:
    """Weights on NVMe are read into buffers of param_buffer_size elements."""
    zero = {"stage": 3, "offload_param": "nvme", "nvme_path": "/nvme"}
    part = 32000 * 1024 // 2  # the embedding's, the largest weight
    small, enough = (
        Recipe(deepspeed=DeepSpeed.from_dict({**zero, "param_buffer_size": n}), world_size=2)
        for n in (1000, part)
    )
    with pytest.raises(IllegalRecipe, match=f"param_buffer_size 1000: .* Use at least {part}"):
        estimate(SMALL, small)
    host = estimate(SMALL, enough).host
    assert host is not None
    assert host.pinned >= 5 * part * 2


def test_the_smallest_of_uneven_cards_decides(model: str, capsys: Any) -> None:
    found = parse_cards("4xA100-80GB, 2xA100-40GB")
    assert (found.gpu.id, found.count) == (parse_cards("a100-40gb").gpu.id, 6)
    assert parse_cards("8xH100-80GB") == parse_cards("8x h100-80gb")
    with pytest.raises(UnknownName):
        parse_cards("4xA100-80GB,4xB1000")
    big, small = parse_cards("2xA100-80GB"), parse_cards("a100-40gb")
    assert smallest_of([big, small], 1) == big
    assert smallest_of([small, big], 2) == big
    assert smallest_of([small, big], 3) == small
    assert smallest_of([], 3) is None
    asked = ["estimate", model, "--gpu", "4xA100-80GB,2xA100-40GB", "--zero", "2", "--json"]
    assert main([*asked, "--seq-len", "512"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["recipe"]["world_size"] == 6
    assert document["gpu"]["id"] == small.gpu.id
