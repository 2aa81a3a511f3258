"""`vramplan trace`: what it takes, and how it ends."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli.main import main

Captured = pytest.CaptureFixture[str]
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SHORT = ("--batch-size", "2", "--seq-len", "64")
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="needs torch and transformers",
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "small.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("words", [(), ("--compare",), ("--json",)])
def test_without_torch_it_says_what_to_install(
    words: tuple[str, ...], model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["trace", model, *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "torch and transformers and accelerate are not installed" in said.err
    assert "pip install 'vramplan[launch]'" in said.err
    assert "Traceback" not in said.err


@needs_torch
def test_flash_attention_is_traced_without_its_package(
    model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "flash_attn" else found(name)
    )
    words = ["trace", model, "--batch-size", "1", "--seq-len", "64"]
    assert main([*words, "--attention", "flash_attention_2", "--compare"]) == 0
    assert "They don't part" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optimizer", "adamv_torch"), "adamw_torch"),
        (("--gpu", "rtx-9999"), "rtx-9999"),
        (("--quantization", "int8"), "int8"),
    ],
)
def test_bad_input(words: tuple[str, ...], said: str, model: str, capsys: Captured) -> None:
    assert main(["trace", model, *words]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_model_ends_before_anything_is_traced(capsys: Captured) -> None:
    assert main(["trace", "./nowhere/config.json", "--offline"]) == 2
    assert "no such file" in capsys.readouterr().err


@needs_torch
def test_it_prints_what_an_estimate_prints(model: str, capsys: Captured) -> None:
    assert main(["trace", model, *SHORT, "--gpu", "24GB"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Fits: ")
    for part in ("At the peak, in ", "Phases", "  forward", "Assumptions", "Traced, not estimated"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80


@needs_torch
def test_json_agrees_with_the_estimate(model: str, capsys: Captured) -> None:
    documents = []
    for command in ("trace", "estimate"):
        assert main([command, model, *SHORT, "--gpu", "24GB", "--json"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    traced, estimated = documents
    assert traced["via"] == "trace"
    assert traced["model"]["parameters"] == estimated["model"]["parameters"]
    assert traced["peak_allocated"] == pytest.approx(estimated["peak_allocated"], rel=1e-3)
    assert traced["recipe"] == estimated["recipe"]


@needs_torch
def test_it_does_not_fit(model: str, capsys: Captured) -> None:
    assert main(["trace", model, *SHORT, "--gpu", "256MB"]) == 1
    assert capsys.readouterr().out.startswith("Does not fit: ")


@needs_torch
def test_compare(model: str, capsys: Captured) -> None:
    assert main(["trace", model, *SHORT, "--compare"]) == 0
    assert "against trace, at the peak" in capsys.readouterr().out
    assert main(["trace", model, *SHORT, "--compare", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert abs(document["error_percent"]) < 0.1
    assert document["parting"] is None
