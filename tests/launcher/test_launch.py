"""`vramplan launch` for real on the processor: training, saving, stopping, resuming."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("datasets")
if sys.platform != "linux":
    pytest.skip("processes are watched through /proc", allow_module_level=True)

SHORT = ("--batch-size", "2", "--seq-len", "32", "--cpu")
Start = Callable[..., Any]


def test_training_ends_with_a_model(
    vramplan: Start, tiny: Path, rows: Path, measured: Callable[[Path], dict[str, Any]]
) -> None:
    """87 sequences: 4 are for evaluation, 83 for training, 42 steps of 2 in an epoch."""
    options = ("--eval-split", "0.05", "--learning-rate", "1e-2", "--save-steps", "15")
    board = importlib.util.find_spec("tensorboard") is not None
    report = ("--report-to", "tensorboard") if board else ()
    run = vramplan("launch", tiny, "--data", rows, *options, *report, *SHORT)
    code, out, err = run.end()
    assert code == 0, err
    (folder,) = run.runs()
    assert bool(list(folder.glob("tensorboard/events*"))) == board
    assert folder.name == "tiny-full"
    assert {p.name for p in folder.iterdir()} >= {
        *("job.json", "command.sh", "log.txt", "measurement.json", "model", "checkpoints"),
    }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (folder / "model").iterdir()
    }
    document = measured(folder)
    training = document["training"]
    assert document["outcome"] == "ended"
    assert training["steps"] == training["of_steps"]
    assert training["losses"][-1][1] < 1 < training["losses"][0][1]  # six words are soon learned
    assert len(list((folder / "checkpoints").iterdir())) == 2  # save_total_limit
    assert document["prediction"]["peak_allocated"] > 0
    assert document["ranks"][0]["peak_allocated"] is None  # no GPU, no figures
    assert "no GPU memory figures" in out
    assert "Evaluation after step" in err
    assert f"Saved: {Path('runs') / 'tiny-full' / 'model'}" in err.replace(f"{run.folder}/", "")
    # The same again goes to a folder of its own.
    job = json.loads((folder / "job.json").read_text())
    assert job["training"]["learning_rate"] == 1e-2
    again = vramplan("launch", folder, "--max-steps", "2", "--save-steps", "0")
    assert again.end()[0] == 0
    assert [f.name for f in again.runs()] == ["tiny-full", "tiny-full-2"]


def test_killed_and_resumed(
    vramplan: Start, tiny: Path, rows: Path, measured: Callable[[Path], dict[str, Any]]
) -> None:
    """A rank is killed; what it was writing is dropped, and the next run goes on from the rest."""
    options = ("--lora-rank", "4", "--max-steps", "4000", "--save-steps", "20", "--epochs", "1000")
    run = vramplan("launch", tiny, "--data", rows, *options, *SHORT)
    folder = run.folder / "runs" / "tiny-lora"
    run.wait_for((folder / "checkpoints" / "checkpoint-40" / "trainer_state.json").exists)
    (pid,) = run.ranks()
    import os

    os.kill(pid, signal.SIGKILL)
    code, _, err = run.end()
    assert code == 4
    assert "log.txt" in err
    assert "Traceback" not in err
    document = measured(folder)
    assert document["outcome"] == "failed"
    assert document["failure"]["code"] == -9
    kept = sorted((folder / "checkpoints").iterdir())
    assert kept
    assert all((path / "trainer_state.json").exists() for path in kept)
    last = max(int(path.name.rpartition("-")[2]) for path in kept)
    assert f"To go on from checkpoint-{last}: vramplan launch" in err
    stop = last + 10
    following = vramplan("launch", folder, "--resume", "--max-steps", stop, "--save-steps", "0")
    code, _, err = following.end()
    assert code == 0, err
    second = measured(run.folder / "runs" / "tiny-lora-2")
    assert second["training"]["steps"] == stop
    assert second["training"]["losses"][0][0] > last  # earlier steps were not run again
    assert (run.folder / "runs" / "tiny-lora-2" / "adapter" / "adapter_config.json").exists()
    assert sorted((folder / "checkpoints").iterdir()) == kept  # untouched


def test_interrupted_it_saves_and_says_how_to_resume(
    vramplan: Start, tiny: Path, rows: Path, measured: Callable[[Path], dict[str, Any]]
) -> None:
    run = vramplan(
        *("launch", tiny, "--data", rows, "--epochs", "1000", "--world-size", "2"),
        *("--save-steps", "0", *SHORT),
    )
    run.wait_for(lambda: "step 1/" in run.errors.read_text())
    assert len(run.ranks()) == 2
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 130, err
    folder = run.folder / "runs" / "tiny-full"
    assert measured(folder)["outcome"] == "interrupted"
    assert [r["outcome"] for r in measured(folder)["ranks"]] == ["interrupted", "interrupted"]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    steps = {r["rank"]: r for r in measured(folder)["ranks"]}
    assert set(steps) == {0, 1}
    assert "vramplan launch runs/tiny-full --resume" in err
    assert (checkpoint / "trainer_state.json").exists()
    assert run.ranks() == []
    more = int(checkpoint.name.rpartition("-")[2]) + 2
    following = vramplan("launch", folder, "--resume", "--max-steps", more, "--save-steps", "0")
    code, _, err = following.end()
    assert code == 0, err
    assert measured(run.folder / "runs" / "tiny-full-2")["training"]["steps"] == more


def test_no_rank_outlives_its_parent_or_the_others(vramplan: Start, tiny: Path, rows: Path) -> None:
    import os

    two = ("launch", tiny, "--data", rows, "--epochs", "1000", "--world-size", "2")
    two = (*two, "--save-steps", "0", *SHORT)
    run = vramplan(*two)
    run.wait_for(lambda: "step 1/" in run.errors.read_text())
    _, second = run.ranks()
    os.kill(second, signal.SIGKILL)
    assert run.end()[0] == 4
    assert run.ranks() == []
    orphaned = vramplan(*two)
    orphaned.wait_for(lambda: "step 1/" in orphaned.errors.read_text())
    orphaned.process.kill()
    orphaned.process.wait()
    import time

    began = time.monotonic()
    while orphaned.ranks():
        assert time.monotonic() - began < 60
        time.sleep(0.2)
    saved = orphaned.folder / "runs" / "tiny-full-2" / "checkpoints"
    assert list(saved.glob("checkpoint-*/trainer_state.json"))  # though nobody listened


def test_a_broken_row_is_named(vramplan: Start, tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text('{"text": "a cat"}\n{"text": 3}\n', encoding="utf-8")
    code, _, err = vramplan("launch", tiny, "--data", data, *SHORT).end()
    assert code == 2
    assert "broken.jsonl" in err
    assert "row 2" in err
    assert "Traceback" not in err


def test_two_parents_are_one_run(
    vramplan: Start, tiny: Path, rows: Path, measured: Callable[[Path], dict[str, Any]]
) -> None:
    """Of two machines, both of them this one."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    words = ("launch", tiny, "--data", rows, "--world-size", "2", "--nnodes", "2", *SHORT)
    words = (*words, "--rendezvous", meeting, "--output", "both", "--max-steps", "4")
    parents = [vramplan(*words, "--save-steps", "0") for _ in range(2)]
    ends = [parent.end() for parent in parents]
    assert [code for code, _, _ in ends] == [0, 0], ends
    folder = parents[0].folder
    assert [r["outcome"] for r in measured(folder / "both")["ranks"]] == ["ended", "ended"]
    assert len(list((folder / "both").glob("log-*.txt"))) == 2
    assert len(list((folder / "share" / "vramplan" / "runs").iterdir())) == 1  # one run
    assert sum("first rank's machine has the report" in out for _, out, _ in ends) == 1
    code, _, err = vramplan(*words).end()
    assert code == 2
    assert "'both' holds checkpoints already, and a run's folder is never overwritten" in err
