"""`vramplan launch` and its kin: what they take and refuse, without starting anything."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli.main import main

Captured = pytest.CaptureFixture[str]
LLAMA = "meta-llama/Llama-3.2-1B"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")),
    reason="needs torch, transformers and peft",
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, a machine with one card of no kind, and nothing that starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("vramplan.hardware.nvml.gpus_here", lambda: ([], "No driver."))

    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("it was started")

    monkeypatch.setattr("vramplan_launcher.watch.Watch.run", never)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("launch", LLAMA), "no GPU to run on. No driver. Add --cpu"),
        (("verify", LLAMA), "no GPU to run on. No driver. Add --cpu"),
        (("launch", LLAMA, "--pretend-ranks", "8"), "--pretend-ranks without ZeRO"),
        (
            ("launch", LLAMA, "--zero", "3", "--pretend-ranks", "8", "--world-size", "4"),
            "--pretend-ranks 8 and --world-size 4 contradict",
        ),
        (("launch", LLAMA, "--text-column", "body"), "--text-column without --data"),
        (("launch", LLAMA, "--resume"), "name the folder of a run"),
        (("launch", LLAMA, "--report-to", "wandbb"), "nearest: 'wandb'"),
        (("launch", LLAMA, "--epochs", "0"), "epochs is 0.0: it must be more than 0"),
        (("verify", LLAMA, "--emulate-gpu", "24QB"), "24QB"),
        (("launch", LLAMA, "--data", "x.jsonl", "--eval-split", "2"), "eval_split"),
        (("launch", LLAMA, "--cpu", "--nnodes", "2"), "no place to meet"),
        (
            ("launch", LLAMA, "--cpu", "--nnodes", "2", "--rendezvous", "a", "--world-size", "3"),
            "3 processes on 2 machines",
        ),
        (
            ("launch", LLAMA, "--cpu", "--nnodes", "2", "--rendezvous", "a", "--world-size", "2"),
            "--rendezvous without --output",
        ),
        (("launch", LLAMA, "--cpu", "--slurm", "--hostfile", "h"), "can't read hostfile 'h'"),
        (("launch", LLAMA, "--cpu", "--slurm", "--rendezvous", "a"), "--slurm with --rendezvous"),
        (("launch", LLAMA, "--cpu", "--slurm", "--nnodes", "2"), "1 processes on 2 machines"),
        (("launch", LLAMA, "--cpu", "--slurm-option", "time=9"), "time=9 without --slurm"),
        (("launch", LLAMA, "--cpu", "--slurm", "--slurm-option", "nodes=9"), "(--nnodes)"),
        (
            ("launch", LLAMA, "--cpu", "--dtype", "fp32", "--mixed-precision", "fp16"),
            "--cpu with mixed precision fp16",
        ),
        (("compare", "nowhere"), "can't read measurement 'nowhere'"),
    ],
)
def test_wrong_input(words: tuple[str, ...], said: str, capsys: Captured) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert said in " ".join(shown.err.split())
    assert "Traceback" not in shown.err
    assert not Path("runs").exists()  # nothing is made for what can't be started


def test_what_does_not_fit_is_not_started(capsys: Captured, tmp_path: Path) -> None:
    words = ("launch", LLAMA, "--cpu", "--gpu", "6GB", "--batch-size", "4")
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "It was not started" in shown.err
    assert "vramplan launch meta-llama/Llama-3.2-1B" in shown.out  # with what would fit
    assert not (tmp_path / "runs").exists()


def test_slurm_writes_a_script_and_starts_nothing(capsys: Captured, tmp_path: Path) -> None:
    words = ("launch", LLAMA, "--zero", "3", "--world-size", "8", "--nnodes", "2", "--slurm")
    site = ("--slurm-option", "partition=gpu", "--slurm-option", "time=2:00:00")
    assert main((*words, *site, "--output", "run", "--no-archive")) == 0
    script = (tmp_path / "run" / "job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --gpus-per-node=4\n" in script
    assert "#SBATCH --partition=gpu\n#SBATCH --time=2:00:00\n" in script
    assert f"vramplan launch {tmp_path / 'run' / 'job.json'}" in script
    assert f"--output {tmp_path / 'run'} --no-archive" in script
    job = json.loads((tmp_path / "run" / "job.json").read_text(encoding="utf-8"))
    assert job["recipe"]["world_size"] == 8
    assert job["prediction"]["peak_allocated"] > 0
    assert "vramplan compare" in capsys.readouterr().out
    assert main(("launch", LLAMA, "--cpu", "--slurm", "--output", "cpu")) == 0
    assert "gpus" not in (tmp_path / "cpu" / "job.sbatch").read_text(encoding="utf-8")


def test_a_plan_is_a_job(tmp_path: Path, capsys: Captured) -> None:
    from vramplan.cli.asked import Asked
    from vramplan.cli.launch import held_job
    from vramplan.recipe.recipe import Recipe

    recipe = Recipe(batch_size=3).to_dict()
    plan = {"schema": 1, "model": {"id": LLAMA}, "recipe": recipe, "gpu": {"id": "h200"}}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    asked = Asked(
        model=str(path),
        card=None,
        recipe_file=None,
        trust_remote_code=False,
        offline=False,
        as_json=False,
        fields={},
    )
    held = held_job(asked)
    assert held is not None
    job, folder = held
    assert (job.model, job.recipe.batch_size) == (LLAMA, 3)
    assert job.gpu is None  # what is in this machine, not the card that it was made for
    assert folder == tmp_path
    assert held_job(asked._replace(model=LLAMA)) is None
    assert main(("launch", str(path), "--batch-size", "2", "--cpu")) == 2
    assert "its recipe is in there" in capsys.readouterr().err


def test_an_empty_archive_says_how_to_fill_it(capsys: Captured) -> None:
    assert main(("accuracy",)) == 0
    assert "vramplan verify MODEL" in " ".join(capsys.readouterr().out.split())
    assert main(("accuracy", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["compared"] == 0
