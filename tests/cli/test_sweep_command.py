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
    result = run(GPT2, "--gpu", "24GB", "--over", "seq=256,512,2048", "--launch", "--json")
    # click 8.1's runner puts what goes to stderr before it
    rows = json.loads(result.stdout[result.stdout.index("{") :])["rows"]
    assert [row["measured_peak"] for row in rows] == [2**31, None, None]
    assert rows[0]["measured_seconds"] == 0.5
    assert rows[1]["why"] == "It fell over."
    assert "positions" in rows[2]["why"]
