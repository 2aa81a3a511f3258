"""`vramplan ladder`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from vramplan.cli.main import cli

MODEL = "meta-llama/Llama-3.2-1B"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["ladder", *arguments], catch_exceptions=False)


def test_the_report() -> None:
    result = run(MODEL, "--gpu", "rtx-4090")
    assert result.exit_code == 0
    for said in ("as it begins", "sdpa attention", "checkpointing", "LoRA *", "The checklist"):
        assert said in result.output
    assert "* changes what is learned" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_it_begins_with_what_is_given() -> None:
    document = json.loads(run(MODEL, "--gpu", "24GB", "--dtype", "bf16", "--lora", "--json").output)
    first = document["rungs"][0]["recipe"]
    assert first["dtype"] == "bf16"
    assert first["lora"] is not None
    assert first["attention"] == "eager"


def test_measured_beside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vramplan_launcher import needs
    from vramplan_launcher import run as running

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needs, "check_installed", lambda job: None)
    monkeypatch.setattr(needs, "check_cards", lambda *a, **k: None)

    def launch(job: object, folder: Path) -> running.Outcome:
        document = {"ranks": [{"peak_allocated": 2**33}], "training": {"step_seconds": 0.5}}
        failed = job.recipe.quantization is not None  # type: ignore[attr-defined]
        return running.Outcome(
            outcome="failed" if failed else "ended",
            folder=folder,
            measurement=document,
            sentence="It fell over." if failed else "",
        )

    monkeypatch.setattr(running, "launch", launch)
    text = run(MODEL, "--gpu", "24GB", "--launch").output
    assert "Run for real" in text
    assert "8.0 GiB" in text
    assert "failed: It fell over." in text
    result = run(MODEL, "--gpu", "24GB", "--launch", "--json")
    rungs = json.loads(result.stdout[result.stdout.index("{") :])["rungs"]
    measured = {rung["name"]: rung["measured_peak"] for rung in rungs if rung["fits"]}
    assert measured.pop("nf4 weights") is None
    assert set(measured.values()) == {2**33}
    assert all(rung["measured_peak"] is None for rung in rungs if not rung["fits"])


def test_no_rung_fits() -> None:
    result = run("meta-llama/Llama-3.1-405B", "--gpu", "8GB")
    assert result.exit_code == 1


def test_the_help_says_where_it_begins() -> None:
    output = run("--help").output
    assert "[fp32]" in output
    assert "[bf16]" not in output.partition("--mixed-precision")[0]
