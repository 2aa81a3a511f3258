"""`vramplan verify` for real on the processor: methods, ZeRO, a run out of memory."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
if sys.platform != "linux":
    pytest.skip("processes are watched through /proc", allow_module_level=True)

SHORT = ("--batch-size", "2", "--seq-len", "64", "--cpu", "--steps", "4")
METHODS = {
    "full": ("--gradient-checkpointing",),
    "8-bit states": ("--optim", "adamw_bnb_8bit"),
    "nf4": ("--quantization", "nf4", "--lora-rank", "4", "--gradient-checkpointing"),
    "int8": ("--quantization", "int8", "--lora-rank", "4"),
    "int8, adapters in bf16": ("--quantization", "int8", "--lora-dtype", "bf16"),
    "fp32, adapters in bf16": ("--dtype", "fp32", "--lora-dtype", "bf16"),
}
ZERO = {
    "zero1": ("--zero", "1", "--world-size", "2", "--launcher", "deepspeed"),
    "zero2-offload": ("--zero", "2", "--world-size", "2", "--offload-optimizer", "cpu"),
    "zero3-offload-lora": (
        *("--zero", "3", "--world-size", "2", "--lora-rank", "4"),
        *("--offload-optimizer", "cpu", "--offload-param", "cpu"),
    ),
    "zero2-alone": ("--zero", "2"),
    "pretended": ("--zero", "3", "--pretend-ranks", "8"),
}
Start = Callable[..., Any]
Measured = Callable[[Path], dict[str, Any]]


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, vramplan: Start, config_only: Path, measured: Measured) -> None:
    """Random weights are made, saved and loaded; four steps run; the figures join the archive.

    What the run holds, counted by tensor, is what was predicted, to the byte.
    """
    pytest.importorskip("bitsandbytes")
    run = vramplan("verify", config_only, *METHODS[name], *SHORT)
    code, out, err = run.end()
    assert code == 0, err
    (folder,) = run.runs()
    document = measured(folder)
    said = document["prediction"]["model"]["trainable_parameters"]
    assert document["model"]["trainable_parameters"] == said
    assert document["training"]["steps"] == 4
    assert len(document["ranks"][0]["step_times"]) == 4
    assert document["ranks"][0]["categories"] == document["prediction"]["held"]
    assert "Predicted:" in out
    assert "optimizer states" in out
    assert not (folder / "model").exists()
    archived = list((run.folder / "share" / "vramplan" / "runs").iterdir())
    assert len(archived) == 1
    assert "seconds_between_steps" not in json.loads(archived[0].read_text())["training"]


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_ranks(name: str, vramplan: Start, config_only: Path, measured: Measured) -> None:
    if name == "zero1":  # of the two commands `launch` takes the launcher's name
        short = (*SHORT[:-2], "--max-steps", "4", "--random-weights")
        run = vramplan("launch", config_only, *ZERO[name], *short)
    else:
        run = vramplan("verify", config_only, *ZERO[name], *SHORT)
    code, out, err = run.end()
    assert code == 0, err + (run.runs()[0] / "log.txt").read_text()[-3000:]
    (folder,) = run.runs()
    document = measured(folder)
    assert len(document["ranks"]) == (1 if name in ("pretended", "zero2-alone") else 2)
    assert {rank["outcome"] for rank in document["ranks"]} == {"ended"}
    if name == "pretended":
        assert "nothing was trained" in " ".join(out.split())
    written = json.loads((folder / "ds_config.json").read_text())
    stage = document["recipe"]["deepspeed"]["stage"]
    assert written["zero_optimization"]["stage"] == stage


def test_out_of_memory(
    vramplan: Start, config_only: Path, tmp_path: Path, measured: Measured
) -> None:
    """A cap that a batch of 2 breaks; the next smaller plan, twice a batch of 1, ends under it.

    Logits of 2 x 512 tokens and 32,000 words are 125 MiB in fp32, and there are several of them.
    """
    wide = tmp_path / "wide"
    wide.mkdir()
    config = {**json.loads((config_only / "config.json").read_text()), "vocab_size": 32_000}
    (wide / "config.json").write_text(json.dumps(config), encoding="utf-8")
    short = ("--seq-len", "512", "--cpu", "--steps", "1", "--anyway", "--no-archive")
    cap = ("--emulate-gpu", "320MB", "--fallback", "1", "--output", "runs/capped")
    run = vramplan("verify", wide, "--batch-size", "2", *short, *cap)
    code, out, err = run.end()
    assert [folder.name for folder in run.runs()] == ["capped", "capped-smaller-1"], err
    first, last = (measured(folder) for folder in run.runs())
    assert first["outcome"] == "out_of_memory", err
    short_of = first["ranks"][0]["out_of_memory"]
    assert (short_of["of"], short_of["step"]) == ("host", 1)
    assert short_of["phase"] in ("forward", "backward")
    assert "Out of host memory in" in out
    assert "the process's data was capped as on a card of 320.0 MiB" in " ".join(out.split())
    assert "Trying a smaller plan (1 of 1): " in err
    assert code == 0, err
    assert last["outcome"] == "ended"
    recipe = last["recipe"]
    assert (recipe["batch_size"], recipe["gradient_accumulation_steps"]) == (1, 2)
    assert not (run.folder / "share").exists()  # kept out of the archive
