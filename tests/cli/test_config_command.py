"""`vramplan config`: the files, and `vramplan estimate --deepspeed` that reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli.main import main

SMALL = "meta-llama/Llama-3.2-1B"
ROOT = Path(__file__).parents[2]
FILES = ["REASONS.md", "accelerate_config.yaml", "ds_config.json", "training_arguments.py"]
Captured = pytest.CaptureFixture[str]


def written(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "ds_config.json").read_text())
    assert isinstance(values, dict)
    return values


def test_the_files(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "a" / "run"
    arguments = ("--zero", "2", "--gpu", "4xA100-80GB", "--gradient-accumulation-steps", "8")
    assert main(["config", SMALL, *arguments, "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == FILES
    values = written(folder)
    assert values["train_batch_size"] == 1 * 8 * 4
    assert '"auto"' not in json.dumps(values)
    shown = capsys.readouterr()
    assert "zero_optimization.reduce_bucket_size: 500000000" in shown.out
    assert "buffers may take" in shown.out
    assert f"  {folder / 'ds_config.json'}" in shown.out
    assert "fits: " in shown.out
    page = (folder / "REASONS.md").read_text()
    for section in values:
        assert f"| `{section}" in page


def test_what_is_written_is_what_is_estimated(tmp_path: Path, capsys: Captured) -> None:
    run = (SMALL, "--gpu", "2xrtx-4090", "--gradient-checkpointing", "--batch-size", "2")
    assert main(["config", *run, "--zero", "3", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    file = str(tmp_path / "ds_config.json")
    assert main(["estimate", *run, "--deepspeed", file, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["required"] == document["required"]
    assert found["recipe"] == document["recipe"]
    assert shown.err == ""


def test_it_loads_nothing_heavy(tmp_path: Path) -> None:
    command = ["config", SMALL, "--zero", "3", "--gpu", "24GB", "--out", str(tmp_path)]
    code = (
        "import sys; from vramplan.cli.main import main; "
        f"code = main({command!r}); assert code in (0, 1), code; "
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'yaml', 'hjson'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    paths = os.pathsep.join((str(ROOT), str(ROOT / "launcher")))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_hf_auto(tmp_path: Path) -> None:
    assert main(["config", SMALL, "--zero", "3", "--out", str(tmp_path), "--hf-auto"]) == 0
    values = written(tmp_path)
    assert values["train_batch_size"] == "auto"
    assert values["bf16"]["enabled"] == "auto"
    assert values["optimizer"]["params"]["lr"] == "auto"
    assert values["zero_optimization"]["reduce_bucket_size"] == "auto"
    assert values["zero_optimization"]["stage"] == 3


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "ds_config.json").write_text("mine")
    assert main(["config", SMALL, "--zero", "2", "--out", str(tmp_path)]) == 2
    assert "holds ds_config.json already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ds_config.json"]
    assert (tmp_path / "ds_config.json").read_text() == "mine"
    assert main(["config", SMALL, "--zero", "2", "--out", str(tmp_path), "--force"]) == 0
    assert written(tmp_path)["zero_optimization"]["stage"] == 2


def test_what_does_not_fit_is_written_and_said(tmp_path: Path, capsys: Captured) -> None:
    run = ("meta-llama/Llama-3.1-8B", "--zero", "2", "--gpu", "2x24GB", "--out", str(tmp_path))
    assert main(["config", *run]) == 1
    assert "does NOT fit" in capsys.readouterr().out
    assert written(tmp_path)["zero_optimization"]["overlap_comm"] is True  # spares nothing


def test_hyperparameters_go_to_both_files(tmp_path: Path) -> None:
    own = ("--learning-rate", "3e-4", "--weight-decay", "0.1", "--max-grad-norm", "0.5")
    first, second = tmp_path / "one", tmp_path / "two"
    assert main(["config", SMALL, "--zero", "1", *own, "--out", str(first)]) == 0
    values = written(first)
    assert values["optimizer"]["params"]["lr"] == 3e-4
    assert values["gradient_clipping"] == 0.5
    assert '"learning_rate": 0.0003,' in (first / "training_arguments.py").read_text()
    # and are read back from there
    file = ("--deepspeed", str(first / "ds_config.json"))
    assert main(["config", SMALL, *file, "--out", str(second)]) == 0
    assert written(second) == values


def test_accelerate_config(tmp_path: Path) -> None:
    run = ("--zero", "3", "--world-size", "16", "--machines", "2")
    assert main(["config", SMALL, *run, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "accelerate_config.yaml").read_text()
    assert "num_processes: 16\n" in text
    assert "num_machines: 2\n" in text
    assert f'deepspeed_config_file: "{(tmp_path / "ds_config.json").as_posix()}"\n' in text
    assert "mixed_precision" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "add a ZeRO stage (--zero 0, 1, 2 or 3)"),
        (("--zero", "4"), "stage is 4: it must be 0, 1, 2 or 3"),
        (("--zero", "2", "--offload-param", "cpu"), "Use stage 3"),
        (("--zero", "2", "--machines", "3", "--world-size", "8"), "divides them"),
        (("--zero", "2", "--learning-rate", "-1"), "learning_rate is -1.0"),
        (("--deepspeed", "nowhere.json"), "can't read DeepSpeed config 'nowhere.json'"),
        (("--deepspeed", "x.json", "--zero", "no"), "contradict each other"),
    ],
)
def test_wrong_input(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: Captured
) -> None:
    folder = tmp_path / "out"
    assert main(["config", SMALL, *arguments, "--out", str(folder)]) == 2
    assert words in capsys.readouterr().err
    assert not folder.exists()


def test_out_is_asked_for(capsys: Captured) -> None:
    assert main(["config", SMALL, "--zero", "2"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_file_in_the_way(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").write_text("")
    assert main(["config", SMALL, "--zero", "2", "--out", str(tmp_path / "out")]) == 2
    assert "can't write '" in capsys.readouterr().err


def test_estimate_reads_what_a_person_wrote(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        """{
          // from the wiki
          "bf16": {"enabled": "auto"},
          "zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8, "overlap_com": true,},
          "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2
        }"""
    )
    assert main(["estimate", SMALL, "--deepspeed", str(file), "--gpu", "24GB", "--json"]) in (0, 1)
    shown = capsys.readouterr()
    recipe = json.loads(shown.out)["recipe"]
    assert recipe["deepspeed"]["reduce_bucket_size"] == 200_000_000
    assert (recipe["batch_size"], recipe["world_size"]) == (2, 8)
    assert "Warning: mine.json: it has comments" in shown.err
    assert "nearest: 'zero_optimization.overlap_comm'" in shown.err
    assert main(["estimate", SMALL, "--deepspeed", str(file), "--mode", "inference"]) == 2
    assert "--deepspeed means nothing with --mode inference" in capsys.readouterr().err


def test_estimate_refuses_a_batch_that_contradicts(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 12}')
    assert main(["estimate", SMALL, "--deepspeed", str(file), "--gpu", "8xA100-80GB"]) == 2
    assert "x 8 (GPUs) = 8: DeepSpeed refuses" in capsys.readouterr().err
