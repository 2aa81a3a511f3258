from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vramplan.models import catalogue
from vramplan.models.catalogue.index import index, render

FILES = sorted(path for path in catalogue.FOLDER.glob("*.json") if path != catalogue.INDEX)
KEYS = {"id", "config", "params_meta", "source", "confidence", "note"}


def test_the_index_equals_the_files() -> None:
    """If this fails: python -m vramplan.models.catalogue.index"""
    assert catalogue.INDEX.read_text(encoding="utf-8") == render(index())
    assert len(catalogue.entries()) == len(FILES) == 88


def test_the_index_is_in_order_and_without_doubles() -> None:
    ids = [entry.id.lower() for entry in catalogue.entries()]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file(path: Path) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == catalogue.file_name(data["id"])
    assert {"id", "config", "params_meta", "source"} <= data.keys() <= KEYS
    assert data["source"].strip() == data["source"] != ""
    assert isinstance(data["config"]["model_type"], str)
    assert type(data["params_meta"]) is int
    assert data["params_meta"] > 10**7


def test_a_source_is_one_that_others_can_read() -> None:
    """A bare number, or an address on one machine, is nothing that anyone could follow."""
    for path in FILES:
        source = json.loads(path.read_text(encoding="utf-8"))["source"]
        assert not re.search(r"\bids? \d|\d{9}|/home/|/tmp/|/work/", source), path.name


def test_load() -> None:
    found = catalogue.load("meta-llama/Llama-3.1-8B")
    assert found is not None
    assert found.id == "meta-llama/Llama-3.1-8B"
    # embedding and head 2 * 128256 * 4096, final norm 4096, and 32 layers of
    # q and o 2 * 4096 * 4096, k and v 2 * 4096 * 1024, MLP 3 * 4096 * 14336, two norms 2 * 4096
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert found.params_meta == 2 * 128256 * 4096 + 4096 + 32 * layer == 8_030_261_248
    assert found.config["num_key_value_heads"] == 8


def test_load_is_without_regard_to_case_and_gives_the_real_id() -> None:
    found = catalogue.load("META-LLAMA/llama-3.1-8b")
    assert found is not None
    assert found.id == "meta-llama/Llama-3.1-8B"


def test_load_of_an_exact_id_opens_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    read_text = Path.read_text

    def counting(self: Path, *args: str, **kwargs: str) -> str:
        opened.append(self.name)
        return read_text(self, *args, **kwargs)

    catalogue.entries.cache_clear()
    monkeypatch.setattr(Path, "read_text", counting)
    catalogue.load("Qwen/Qwen2.5-7B")
    assert opened == ["Qwen__Qwen2.5-7B.json"]
    opened.clear()
    catalogue.search("")
    assert opened == ["index.json"]


def test_what_load_returns_may_be_changed() -> None:
    first = catalogue.load("openai-community/gpt2")
    assert first is not None
    first.config.clear()
    second = catalogue.load("openai-community/gpt2")
    assert second is not None
    assert second.config["model_type"] == "gpt2"


@pytest.mark.parametrize("name", ["", "index", "../index", "nobody/nothing", "a/b/c", "gpt2", "/"])
def test_load_knows_no_such_model(name: str) -> None:
    assert catalogue.load(name) is None


def test_named() -> None:
    assert catalogue.named("llama-3.1-8B") == ("meta-llama/Llama-3.1-8B",)
    assert catalogue.named("Llama-2-7b-hf") == (
        "meta-llama/Llama-2-7b-hf",
        "NousResearch/Llama-2-7b-hf",
    )
    assert catalogue.named("Llama") == ()


def test_search() -> None:
    assert [entry.id for entry in catalogue.search("opt 350M")] == ["facebook/opt-350m"]
    assert {entry.model_type for entry in catalogue.search("gpt_neox")} == {"gpt_neox"}
    assert len(catalogue.search("")) == 88
    assert catalogue.search("no-such-model") == ()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("meta-lama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Qwen2.5-7b-", "Qwen/Qwen2.5-7B"),
        ("phi2", "microsoft/phi-2"),
    ],
)
def test_similar(name: str, first: str) -> None:
    assert catalogue.similar(name)[0] == first
    assert len(catalogue.similar(name)) <= 3


def test_nothing_is_similar_to_noise() -> None:
    assert catalogue.similar("zzzzzzzzzz/xxxxxxxxxx") == ()
