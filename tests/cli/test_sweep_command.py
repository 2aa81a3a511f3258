"""`vramplan sweep`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vramplan.cli.main import cli

GPT2 = "openai-community/gpt2"
OVER = ("--over", "lora-rank=8,64", "--over", "seq=256,512")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["sweep", *arguments], catch_exceptions=False)


def test_the_table() -> None:
    result = run(GPT2, "--gpu", "24GB", *OVER)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == 2 + 4
    assert "tokens/s" in lines[1]
    assert max(map(len, lines)) <= 80


def test_json_and_csv() -> None:
    document = json.loads(run(GPT2, "--gpu", "24GB", *OVER, "--json").output)
    assert len(document["rows"]) == 4
    csv = run(GPT2, "--gpu", "24GB", *OVER, "--csv").output.splitlines()
    assert csv[0].startswith("lora_rank,seq_len,peak_allocated,required")
    assert len(csv) == 5


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plot(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"sweep.{kind}"
    assert run(GPT2, "--gpu", "24GB", *OVER, "--plot", str(path)).exit_code == 0
    assert path.stat().st_size > 1000
    again = run(GPT2, "--gpu", "24GB", *OVER, "--plot", str(path))
    assert again.exit_code == 2
    assert "not overwritten" in again.output


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(GPT2, *OVER, "--plot", str(tmp_path / "a.png"))
    assert result.exit_code == 2
    assert "vramplan[plot]" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to sweep over"),
        (("--over", "speed=1"), "unknown field to sweep over"),
        (("--over", "seq"), "--over is 'seq'"),
        (("--over", "seq=1", "--over", "seq=2"), "given twice"),
        (("--over", "seq=256", "--plot", "a.pdf"), "a .png or .svg file"),
        (("--over", "seq=256", "--plot", "no/such/a.png"), "there is no folder 'no/such'"),
        (("--over", "seq=0"), "seq_len is 0"),
        (("--over", "lora-dropout=0,2"), "lora.dropout is 2.0"),
        (("--over", "zero=5"), "deepspeed.stage is 5"),
        (("--over", "seq=256", "--random-weights"), "means nothing without --launch"),
        (("--over", "seq=256", "--csv", "--json"), "leave one of them out"),
    ],
)
def test_wrong_input(arguments: tuple[str, ...], said: str) -> None:
    result = run(GPT2, *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_over_zero_is_over_all_cards() -> None:
    arguments = ("--gpu", "4xA100-80GB", "--over", "zero=no,3", "--seq-len", "512", "--json")
    rows = json.loads(run(GPT2, *arguments).output)["rows"]
    assert [row["recipe"]["world_size"] for row in rows] == [4, 4]


def test_none_fits() -> None:
    assert run("meta-llama/Llama-3.1-8B", "--gpu", "8GB", "--over", "batch=1,2").exit_code == 1


def test_no_gpu_to_launch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no --cpu here to point to."""
    from vramplan.hardware import nvml

    monkeypatch.setattr(nvml, "gpus_here", lambda: ([], "This machine has no NVIDIA driver."))
    pytest.importorskip("torch")
    result = run(GPT2, "--gpu", "24GB", "--over", "seq=256", "--launch")
    assert result.exit_code == 2
    assert "--launch needs a GPU" in result.output
    assert "--cpu" not in result.output


def test_what_a_plot_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Required memory against the card's; of measured runs, what torch counts in both."""
    pytest.importorskip("matplotlib")
    from dataclasses import replace

    from matplotlib.figure import Figure

    from vramplan.planner.sweep import sweep
    from vramplan.recipe.recipe import Recipe
    from vramplan.reports.plot import draw
    from vramplan.units import GIB

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    over = {"seq_len": (128, 256, 1024), "batch_size": (1,)}
    found = sweep(GPT2, Recipe(), over, "24GB")
    draw(found, tmp_path / "a.png")
    rows = tuple(replace(row, measured_peak=2**30) for row in found.rows)
    draw(replace(found, rows=rows), tmp_path / "b.png")
    short = Recipe(seq_len=256)
    draw(sweep(GPT2, short, {"optimizer": ("sgd", "adafactor")}), tmp_path / "c.png")
    draw(sweep(GPT2, Recipe(seq_len=2048), {"batch_size": (1, 2)}), tmp_path / "refused.png")
    plain, measured, names, refused = (figure.axes[0] for figure in drawn)
    assert not refused.lines
    assert plain.get_xlabel() == "seq_len"  # the last with several values
    assert plain.get_xscale() == "log"
    sizes = [row.required / GIB for row in found.rows if row.required]
    assert list(plain.lines[0].get_ydata()) == sizes
    peaks = [row.peak_allocated / GIB for row in found.rows if row.peak_allocated]
    assert list(measured.lines[0].get_ydata()) == peaks
    assert list(measured.lines[1].get_ydata()) == [1.0] * 3
    assert names.lines[0].get_linestyle() == "None"  # nothing lies between two names


def test_measured_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that fit are run; a refused one, and one that fails, keep their reason."""
    from vramplan_launcher import needs
    from vramplan_launcher import run as running

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needs, "check_installed", lambda job: None)
    monkeypatch.setattr(needs, "check_cards", lambda *a, **k: None)

    def launch(job: object, folder: Path) -> running.Outcome:
        assert job.verify  # type: ignore[attr-defined]
        document = {"ranks": [{"peak_allocated": 2**31}], "training": {"step_seconds": 0.5}}
        failed = job.recipe.seq_len == 512  # type: ignore[attr-defined]
        return running.Outcome(
            outcome="failed" if failed else "ended",
            folder=folder,
            measurement=document,
            sentence="It fell over." if failed else "",
        )

    monkeypatch.setattr(running, "launch", launch)
    text = run(GPT2, "--gpu", "24GB", "--over", "seq=256,512,2048", "--launch").stdout
    assert "its run failed: It fell over." in text
    assert max(map(len, text.splitlines())) <= 80
    result = run(GPT2, "--gpu", "24GB", "--over", "seq=256,512,2048", "--launch", "--json")
    # click 8.1's runner puts what goes to stderr before it
    rows = json.loads(result.stdout[result.stdout.index("{") :])["rows"]
    assert [row["measured_peak"] for row in rows] == [2**31, None, None]
    assert rows[0]["measured_seconds"] == 0.5
    assert rows[1]["why"] == "It fell over."
    assert "positions" in rows[2]["why"]
