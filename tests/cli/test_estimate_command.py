"""`vramplan estimate`: what it takes, how it ends, and what its output survives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.cli.main import main
from vramplan.hardware.catalogue import parse_gpu
from vramplan.memory.estimate import estimate
from vramplan.models import catalogue
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.files import write_recipe
from vramplan.recipe.recipe import LoRA, Recipe

ROOT = Path(__file__).parents[2]
LARGE, SMALL = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine the tests run on, it has no GPU."""
    from vramplan.hardware import nvml

    monkeypatch.setattr(nvml, "gpus_here", lambda: ([], "This machine has no NVIDIA driver."))
    monkeypatch.setenv("COLUMNS", "80")


def as_json(capsys: Captured, *arguments: str) -> dict[str, object]:
    code = main(["estimate", *arguments, "--json"])
    shown = capsys.readouterr()
    assert code in (0, 1), shown.err
    assert shown.err == ""
    document: dict[str, object] = json.loads(shown.out)
    return document


# --- how it ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((LARGE, "--gpu", "24GB"), 1),
        ((LARGE, "--gpu", "80GB"), 0),
        ((LARGE,), 0),
        ((LARGE, "--gpu", "24GB", "--mode", "inference"), 0),
        ((LARGE, "--gpu", "8GB", "--mode", "inference"), 1),
    ],
)
def test_exit_codes(
    arguments: tuple[str, ...], flags: tuple[str, ...], code: int, capsys: Captured
) -> None:
    assert main(["estimate", *arguments, *flags]) == code
    shown = capsys.readouterr()
    assert shown.out
    assert shown.err == ""


def test_without_a_gpu_it_says_so_and_gives_no_verdict(capsys: Captured) -> None:
    assert main(["estimate", SMALL]) == 0
    out = capsys.readouterr().out
    assert "This machine has no NVIDIA driver." in out
    assert "--gpu 24GB" in out
    assert "its" not in out.splitlines()[0]  # "Fits", "Does not fit"


def test_without_gpu_option_the_cards_of_this_machine_count(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from dataclasses import replace

    from vramplan.hardware import nvml

    full = replace(parse_gpu("a100-80gb"), free=2**30, indices=(0,))
    free = replace(parse_gpu("rtx-4090"), free=20 * 2**30, indices=(1,))
    monkeypatch.setattr(nvml, "gpus_here", lambda: ([full, free], ""))
    assert main(["estimate", LARGE]) == 1
    assert "20.0 GiB now available: GeForce RTX 4090." in capsys.readouterr().out
    document = as_json(capsys, LARGE)
    assert document["gpu"]["id"] == "rtx-4090"  # type: ignore[index]
    assert document["fits"] is False


# --- what it takes --------------------------------------------------------------------------


def test_json_is_the_estimates_own_document(capsys: Captured) -> None:
    document = as_json(capsys, LARGE, "--gpu", "24GB")
    assert document == json.loads(json.dumps(estimate(LARGE, gpu="24GB").to_dict()))
    assert set(document) >= {
        "schema",
        "model",
        "recipe",
        "peak_allocated",
        "peak_phase",
        "phases",
        "breakdown",
        "overhead",
        "required",
        "gpu",
        "fits",
    }
    assert document["schema"] == 1
    assert document["fits"] is False
    assert sum(document["breakdown"].values()) == document["peak_allocated"]  # type: ignore[attr-defined]
    required = document["peak_allocated"] + sum(document["overhead"].values())  # type: ignore[attr-defined, operator]
    assert document["required"] == required
    assert set(document["phases"]) >= {"load", "forward", "backward", "optimizer_step"}  # type: ignore[call-overload]


def test_json_holds_what_was_asked_for_besides(capsys: Captured) -> None:
    document = as_json(capsys, SMALL, "--gpu", "8GB", "--advice", "--explain")
    terms = document["explanation"]["terms"]  # type: ignore[index]
    assert sum(term["bytes"] for term in terms) == document["peak_allocated"]
    advice = document["advice"]
    assert isinstance(advice, list)
    assert {"name", "recipe", "required", "saving", "fits", "flags"} <= set(advice[0])
    assert Recipe.from_dict(document["combination"]["recipe"])  # type: ignore[index]


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ((), Recipe()),
        (
            ("--dtype", "fp32", "--mixed-precision", "no"),
            Recipe(dtype="fp32", mixed_precision="no"),
        ),
        (("--lora",), Recipe(lora=LoRA())),
        (("--lora-rank", "64"), Recipe(lora=LoRA(rank=64))),
        (
            ("--lora-alpha", "8", "--lora-dropout", "0", "--lora-dtype", "bf16"),
            Recipe(lora=LoRA(alpha=8.0, dropout=0.0, dtype="bf16")),
        ),
        (("--lora-targets", "all-linear"), Recipe(lora=LoRA())),
        (
            ("--lora-targets", "q_proj, v_proj"),
            Recipe(lora=LoRA(target_modules=("q_proj", "v_proj"))),
        ),
        (
            ("--quantization", "nf4", "--no-double-quant", "--lora"),
            Recipe(quantization="nf4", double_quant=False, lora=LoRA()),
        ),
        (("--quantization", "none"), Recipe()),
        (("--attention", "eager"), Recipe(attention="eager")),
        (("--gradient-checkpointing",), Recipe(gradient_checkpointing=True)),
        (("--optim", "adafactor"), Recipe(optimizer="adafactor")),
        (("--optimizer", "sgd"), Recipe(optimizer="sgd")),
        (("--batch-size", "4", "--seq-len", "8k"), Recipe(batch_size=4, seq_len=8192)),
        (("--seq_len", "512"), Recipe(seq_len=512)),
        (("--gradient-accumulation-steps", "16"), Recipe(gradient_accumulation_steps=16)),
        (("--allocator", "default"), Recipe(allocator="default")),
        (("--zero", "1"), Recipe(deepspeed=DeepSpeed(stage=1))),
        (("--zero", "2", "--world-size", "1k"), Recipe(deepspeed=DeepSpeed(), world_size=1024)),
        (
            ("--zero", "3", "--offload-optimizer", "cpu", "--offload-param", "cpu"),
            Recipe(deepspeed=DeepSpeed(stage=3, offload_optimizer="cpu", offload_param="cpu")),
        ),
        (
            ("--zero", "3", "--offload-optimizer", "nvme", "--nvme-path", "/nvme"),
            Recipe(deepspeed=DeepSpeed(stage=3, offload_optimizer="nvme", nvme_path="/nvme")),
        ),
        (("--zero", "no"), Recipe()),
    ],
)
def test_an_option_a_field(flags: tuple[str, ...], recipe: Recipe, capsys: Captured) -> None:
    document = as_json(capsys, SMALL, *flags)
    assert document["recipe"] == recipe.to_dict()
    assert document["required"] == estimate(SMALL, recipe).required


def test_every_field_has_an_option(capsys: Captured) -> None:
    from dataclasses import fields

    assert main(["estimate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    for field in fields(Recipe):
        name = "zero" if field.name == "deepspeed" else field.name
        assert f"--{name.replace('_', '-')}" in shown
    for field in fields(LoRA):
        assert f"--lora-{field.name.replace('target_modules', 'targets')}" in shown


def test_options_override_a_recipe_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "run.json"
    recipe = Recipe(lora=LoRA(rank=8, dropout=0.0), quantization="nf4", batch_size=2)
    write_recipe(recipe, file)
    assert as_json(capsys, SMALL, "--recipe", str(file))["recipe"] == recipe.to_dict()
    changed = as_json(capsys, SMALL, "--recipe", str(file), "--lora-rank", "4", "--seq-len", "1k")
    wanted = Recipe(lora=LoRA(rank=4, dropout=0.0), quantization="nf4", batch_size=2, seq_len=1024)
    assert changed["recipe"] == wanted.to_dict()
    full = as_json(capsys, SMALL, "--recipe", str(file), "--no-lora", "--quantization", "none")
    assert full["recipe"] == Recipe(batch_size=2).to_dict()


def test_a_model_is_a_name_a_folder_or_a_file(tmp_path: Path, capsys: Captured) -> None:
    bundled = catalogue.load(SMALL)
    assert bundled is not None
    (tmp_path / "config.json").write_text(json.dumps(bundled.config))
    sizes = {
        as_json(capsys, model, *flags)["required"]
        for model in (SMALL, "Llama-3.2-1B", str(tmp_path), str(tmp_path / "config.json"))
        for flags in ((), ("--offline",))
    }
    assert len(sizes) == 1


def test_offline_keeps_name_and_notes(capsys: Captured) -> None:
    assert main(["estimate", "Llama-3.2-1B", "--offline"]) == 0
    out = capsys.readouterr().out
    assert f"\n{SMALL}: 1.24B parameters" in out
    assert f"Llama-3.2-1B was read as {SMALL}." in out


def test_inference(capsys: Captured) -> None:
    document = as_json(capsys, SMALL, "--mode", "inference", "--seq-len", "4k", "--prompt", "1000")
    assert document["mode"] == "inference"
    assert (document["context"], document["prompt"]) == (4096, 1000)
    assert document["model"]["id"] == SMALL  # type: ignore[index]


def test_explain(capsys: Captured) -> None:
    assert main(["estimate", SMALL, "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.index("Assumptions") < out.index("getChosenWorkspaceSize")


# --- advice ---------------------------------------------------------------------------------


def test_the_pasted_command_fits(capsys: Captured) -> None:
    import shlex

    arguments = [LARGE, "--gpu", "RTX 4090", "--offline", "--lora", "--dtype", "fp32"]
    assert main(["estimate", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  vramplan estimate"))
    pasted = lines[at]
    while pasted.endswith("\\"):
        at += 1
        pasted = pasted.removesuffix("\\") + lines[at]
    command, *again = shlex.split(pasted)
    assert command == "vramplan"
    assert again[1:5] == [LARGE, "--gpu", "RTX 4090", "--offline"]
    assert main(again) == 0
    assert capsys.readouterr().out.startswith("Fits")


def test_advice_is_for_what_does_not_fit_or_for_who_asks(capsys: Captured) -> None:
    main(["estimate", SMALL, "--gpu", "80GB"])
    assert "Single changes" not in capsys.readouterr().out
    main(["estimate", SMALL, "--gpu", "80GB", "--advice"])
    assert "Single changes" in capsys.readouterr().out
    main(["estimate", LARGE, "--gpu", "24GB"])
    assert "Single changes" in capsys.readouterr().out


# --- what its output survives ---------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_encodings(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    command = [sys.executable, "-m", "vramplan", "estimate", LARGE, "--gpu", "24GB"]
    done = subprocess.run(
        command, capture_output=True, env=environment, cwd=ROOT, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"")
    text = done.stdout.decode(encoding)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text  # no terminal, no colour
    assert ("█" in text) == (encoding == "utf-8")
    assert ("#" in text) == (encoding != "utf-8")
    if encoding != "utf-8":
        assert "?" not in text


def test_it_imports_nothing_slow() -> None:
    code = (
        "import sys\n"
        "from vramplan.cli.estimate import command\n"
        f"command(['{LARGE}', '--gpu', '24GB'], standalone_mode=False)\n"
        "slow = {'rich', 'huggingface_hub', 'pynvml', 'textwrap', 'shutil', 'torch', 'numpy'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_zero_over_the_cards_that_are_named(capsys: Captured) -> None:
    several = as_json(capsys, SMALL, "--zero", "3", "--gpu", "8xH100-80GB")
    assert several["recipe"]["world_size"] == 8
    alone = as_json(capsys, SMALL, "--zero", "3", "--gpu", "8xH100-80GB", "--world-size", "2")
    assert alone["recipe"]["world_size"] == 2
    without = as_json(capsys, SMALL, "--gpu", "8xH100-80GB")
    assert without["recipe"]["world_size"] == 1
    assert "host" not in without
    assert set(several["host"]) == {"pinned", "pageable", "nvme", "loading"}


def test_host_memory_is_shown(capsys: Captured) -> None:
    flags = ("--zero", "2", "--offload-optimizer", "cpu", "--gpu", "4xH100-80GB")
    main(["estimate", SMALL, "--offline", *flags])
    shown = capsys.readouterr().out
    assert "each of 4 x" in shown
    assert "ZeRO stage 2, optimizer on cpu" in shown
    assert "Host, a rank:" in shown
    assert "pinned" in shown
    assert "all 4 ranks" in shown


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_zero_is_explained(stage: str, capsys: Captured) -> None:
    document = as_json(capsys, SMALL, "--zero", stage, "--world-size", "4", "--explain")
    terms = document["explanation"]["terms"]
    assert sum(term["bytes"] for term in terms) == document["peak_allocated"]
