"""`vramplan estimate --via trace`: architectures that vramplan does not describe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli.main import main

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import api, cache

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
UNKNOWN: dict[str, dict[str, Any]] = {
    "gpt_bigcode": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000},
    "nemotron": SIZES,
    "t5": {
        "vocab_size": 1000,
        "d_model": 64,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "d_kv": 16,
        "decoder_start_token_id": 0,
    },
    "llava": {
        "text_config": {**SIZES, "model_type": "llama"},
        "vision_config": {
            **EYES,
            "model_type": "clip_vision_model",
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        "image_token_index": 990,
    },
}
SHORT = ("--batch-size", "2", "--seq-len", "64")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "cache" / "vramplan" / "traces"


def written(folder: Path, family: str) -> str:
    path = folder / f"{family}.json"
    path.write_text(json.dumps({"model_type": family, **UNKNOWN[family]}), encoding="utf-8")
    return str(path)


def asked(capsys: Captured, *arguments: str) -> dict[str, Any]:
    code = main(["estimate", *arguments, *SHORT, "--via", "trace", "--gpu", "24GB", "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    document: dict[str, Any] = json.loads(shown.out)
    return document


@pytest.mark.parametrize("family", UNKNOWN)
def test_what_is_not_described_is_traced(family: str, tmp_path: Path, capsys: Captured) -> None:
    document = asked(capsys, written(tmp_path, family))
    phases = document["phases"]
    weights = 2 * document["model"]["parameters"]
    assert phases["load"]["end"] >= weights
    assert phases["load"]["end"] <= phases["forward"]["end"] <= phases["backward"]["peak"]
    assert document["peak_allocated"] == max(p["peak"] for p in phases.values())
    assert sum(document["breakdown"].values()) == document["peak_allocated"]
    overhead = sum(document["overhead"].values())
    assert document["required"] == document["peak_allocated"] + overhead
    assert document["fits"] is True


def test_it_has_the_keys_of_an_estimate(tmp_path: Path, capsys: Captured) -> None:
    traced = asked(capsys, written(tmp_path, "nemotron"))
    main(["estimate", "HuggingFaceTB/SmolLM2-135M", "--gpu", "24GB", "--json"])
    estimated = json.loads(capsys.readouterr().out)
    assert {*traced} - {*estimated} == {"via", "versions"}
    assert {*estimated} <= {*traced}


def test_asking_without_the_option_offers_it(tmp_path: Path, capsys: Captured) -> None:
    assert main(["estimate", written(tmp_path, "nemotron")]) == 2
    said = capsys.readouterr().err
    assert "'nemotron' is not described" in said
    assert "--via trace" in said
    assert "Traceback" not in said


def test_asking_again_needs_no_torch(tmp_path: Path, capsys: Captured, own_cache: Path) -> None:
    path = written(tmp_path, "nemotron")
    first = asked(capsys, path)
    assert len(list(own_cache.iterdir())) == 1
    code = (
        "import sys; from vramplan.cli.main import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers'} & {*sys.modules}; sys.exit(code)"
    )
    words = ["estimate", path, *SHORT, "--via", "trace", "--gpu", "24GB", "--json"]
    again = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launcher'}"},
    )
    assert json.loads(again.stdout) == first


def test_a_machine_without_the_libraries_takes_the_newest(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "nemotron")
    first = asked(capsys, path)
    monkeypatch.setattr(cache, "versions", dict)
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    assert asked(capsys, path) == first
    assert main(["estimate", path, "--seq-len", "32", "--via", "trace"]) == 2
    assert "pip install 'vramplan[launch]'" in capsys.readouterr().err


def test_another_recipe_is_another_trace(own_cache: Path) -> None:
    from vramplan.recipe.recipe import Recipe

    config = {"model_type": "llama"}
    keys = {
        cache.key(config, Recipe(), "9.0", None),
        cache.key(config, Recipe(seq_len=1), "9.0", None),
        cache.key(config, Recipe(), "8.0", None),
        cache.key({"model_type": "gpt2"}, Recipe(), "9.0", None),
    }
    assert len({key.subject for key in keys}) == 4
    assert len({key.libraries for key in keys}) == 1


def test_a_broken_cache_is_no_cache(own_cache: Path) -> None:
    key = cache.Key("a", "b", True)
    cache.write(key, {"peak": 1})
    assert cache.read(key) == {"peak": 1}
    (own_cache / "a-b.json").write_text("{", encoding="utf-8")
    assert cache.read(key) is None


CODE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=100, hidden_size=64, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)

class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    _supports_sdpa = True
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        width, depth = config.hidden_size, config.num_hidden_layers
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.lm_head
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        logits = self.lm_head(x)
        loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
"""


def test_a_folder_with_its_own_code(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    config = {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 3,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["estimate", str(folder), "--via", "trace", *SHORT]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    document = asked(capsys, str(folder), "--trust-remote-code")
    assert document["model"]["parameters"] == 2 * 100 * 64 + 3 * (64 * 64 + 64)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--via", "guess"), "unknown way"),
        (("--via", "trace", "--explain"), "--explain needs the rules"),
        (("--via", "trace", "--mode", "inference"), "--mode inference"),
        (("--trust-remote-code",), "without --via trace"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...], said: str, capsys: Captured) -> None:
    assert main(["estimate", "HuggingFaceTB/SmolLM2-135M", *words]) == 2
    assert said in capsys.readouterr().err
