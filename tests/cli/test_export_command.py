"""`vramplan export`, and `--from` of the commands that have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.cli.main import main

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
MODEL = "meta-llama/Llama-3.1-8B"
AXOLOTL = """
base_model: meta-llama/Llama-3.1-8B
adapter: lora
lora_r: 8
lora_target_linear: true
lora_qkv_kernel: true
sequence_len: 4096
micro_batch_size: 2
gradient_checkpointing: true
attn_implementation: sdpa
learning_rate: 1e-5
lr_scheduler: cosine
"""


@pytest.fixture
def axolotl(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(AXOLOTL)
    return str(path)


def test_it_prints_a_file_and_says_what_differs(capsys: Captured) -> None:
    words = ["--to", "llama-factory", "--lora", "--quantization", "nf4", "--seq-len", "4k"]
    assert main(["export", MODEL, *words, "--data", "rows", "--epochs", "3"]) == 0
    said = capsys.readouterr()
    assert f'model_name_or_path: "{MODEL}"' in said.out
    assert "cutoff_len: 4096" in said.out
    assert "quantization_bit: 4" in said.out
    assert 'dataset: "rows"' in said.out
    assert "num_train_epochs: 3.0" in said.out
    assert "Note: LLaMA-Factory leaves embeddings" in said.err


def test_a_script_that_can_be_compiled(capsys: Captured) -> None:
    assert main(["export", MODEL, "--to", "training-arguments", "--lora"]) == 0
    compile(capsys.readouterr().out, "script.py", "exec")


def test_json(capsys: Captured) -> None:
    assert main(["export", MODEL, "--to", "axolotl", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"].startswith("# Axolotl")
    assert all(note in document["text"] for note in document["notes"])


def test_ds_config_goes_beside_the_file(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "new" / "run.yaml"
    words = ["export", MODEL, "--to", "axolotl", "--zero", "2", "--world-size", "4"]
    words += ["--learning-rate", "3e-5", "--out", str(out)]
    assert main(words) == 0
    config = json.loads((out.parent / "ds_config.json").read_text())
    assert config["zero_optimization"]["stage"] == 2
    # Trainer refuses a learning rate other than its own.
    assert config["optimizer"]["params"]["lr"] == 3e-5
    assert "learning_rate: 3.0e-05" in out.read_text()
    assert f'deepspeed: "{(out.parent / "ds_config.json").as_posix()}"' in out.read_text()
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


def test_a_file_that_stays_the_same_is_not_in_the_way(tmp_path: Path) -> None:
    """Of one plan, several tools' files beside one ds_config.json."""
    words = ["export", MODEL, "--zero", "2", "--world-size", "2"]
    for tool in ("training-arguments", "trl"):
        assert main([*words, "--to", tool, "--out", str(tmp_path / f"{tool}.py")]) == 0
    other = [*words, "--learning-rate", "0.5", "--to", "trl", "--out", str(tmp_path / "other.py")]
    assert main(other) == 2  # its ds_config.json has another learning rate
    assert not (tmp_path / "other.py").exists()


def test_json_goes_to_no_file(tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "train.py"
    assert main(["export", MODEL, "--to", "trl", "--json", "--out", str(out)]) == 2
    assert "leave out --out" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--learning-rate", "--epochs"])
def test_no_endless_run(option: str, capsys: Captured) -> None:
    assert main(["export", MODEL, "--to", "trl", option, "inf"]) == 2
    assert "more than 0" in capsys.readouterr().err


def test_from_another_tools_file(axolotl: str, capsys: Captured) -> None:
    words = ["export", "--from", axolotl, "--to", "training-arguments", "--batch-size", "4"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert f'MODEL = "{MODEL}"' in said.out
    assert '"per_device_train_batch_size": 4' in said.out  # the option wins
    assert '"learning_rate": 1e-05' in said.out
    assert "SEQ_LEN = 4096" in said.out
    assert "Warning: run.yaml: lora_qkv_kernel: True is not honoured" in said.err
    assert "lr_scheduler" not in said.err
    assert main([*words, "-v"]) == 0
    said = capsys.readouterr()
    assert "Passed over, as it costs no memory: " in said.err
    assert "lr_scheduler" in said.err


def test_from_a_plan(tmp_path: Path, capsys: Captured) -> None:
    plan = {"schema": 1, "model": {"id": MODEL}, "recipe": {"batch_size": 7}}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert main(["export", str(path), "--to", "axolotl"]) == 0
    said = capsys.readouterr().out
    assert "micro_batch_size: 7" in said
    assert f'base_model: "{MODEL}"' in said


def test_an_estimate_from_another_tools_file(axolotl: str, capsys: Captured) -> None:
    assert main(["estimate", "--from", axolotl, "--gpu", "24GB", "--json"]) in (0, 1)
    by_file = json.loads(capsys.readouterr().out)
    words = ["--lora", "--lora-rank", "8", "--lora-dropout", "0", "--batch-size", "2"]
    words += ["--seq-len", "4096", "--gradient-checkpointing", "--gpu", "24GB", "--json"]
    assert main(["estimate", MODEL, *words]) in (0, 1)
    assert by_file == json.loads(capsys.readouterr().out)


WRONG = {
    "no target": (["export", MODEL], "Missing option '--to'"),
    "target": (["export", MODEL, "--to", "axolotel"], "nearest: 'axolotl'"),
    "no model": (["export", "--to", "trl"], "Missing argument 'MODEL'."),
    "no words": (["export", MODEL, "--to", "axolotl", "--dtype", "fp32"], "has no words for dtype"),
    "rate": (["export", MODEL, "--to", "trl", "--learning-rate", "0"], "more than 0"),
    "two recipes": (
        ["estimate", MODEL, "--from", "a.yaml", "--recipe", "b.json"],
        "--from and --recipe are both a run's recipe",
    ),
    "no file": (["estimate", "--from", "/no/a.yaml"], "can't read '/no/a.yaml': No such file"),
    "nothing": (["estimate"], "Missing argument 'MODEL'."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str, capsys: Captured) -> None:
    words, said = WRONG[case]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_a_file_that_names_no_model(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "training_args.json"
    path.write_text('{"output_dir": "o", "per_device_train_batch_size": 1}')
    assert main(["estimate", "--from", str(path)]) == 2
    assert "names no model: name it before the options" in capsys.readouterr().err
    assert main(["estimate", MODEL, "--from", str(path)]) == 0


def test_it_loads_nothing_heavy(axolotl: str) -> None:
    program = (
        "import sys\nfrom vramplan.cli.main import main\n"
        f"main(['export', '--from', {axolotl!r}, '--to', 'trl'])\n"
        "print('LOADED', *({'torch', 'transformers', 'numpy', 'huggingface_hub'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"},
    )
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_a_file_that_is_not_there(capsys: Captured, tmp_path: Path) -> None:
    assert main(["export", str(tmp_path / "plan.json"), "--to", "trl"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_zero_is_over_all_cards(capsys: Captured) -> None:
    assert main(["export", MODEL, "--to", "trl", "--zero", "2", "--gpu", "4xA100-80GB"]) == 0
    assert "--nproc-per-node 4" in capsys.readouterr().out
