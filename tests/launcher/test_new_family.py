"""docs/new-family.md: its code describes a family; the comparison proves it, or says where not."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vramplan.models import blocks, hf_config
from vramplan.recipe.recipe import LoRA, Recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import compare

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).parents[2] / "docs" / "new-family.md"
CONFIG: dict[str, Any] = {
    "model_type": "seed_oss",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
}
MLP = "    def mlp(self, x: Tensor, name: str) -> Tensor:"


def described(monkeypatch: pytest.MonkeyPatch, description: str, reader: str) -> None:
    """Puts both modules where the page says."""
    for package, code in ((blocks, description), (hf_config, reader)):
        module = ModuleType(f"{package.__name__}.seed_oss")
        exec(code, vars(module))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(blocks.FAMILIES, "seed_oss", "seed_oss:SeedOss")
    monkeypatch.setitem(hf_config.READERS, "seed_oss", "seed_oss:seed_oss")


def page() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_it_takes_thirty_lines() -> None:
    lines = [line for code in page() for line in code.splitlines() if line.strip()]
    assert len(lines) <= 30


@pytest.mark.parametrize(
    "fields",
    [{}, {"lora": LoRA(rank=4), "gradient_checkpointing": True}, {"attention": "eager"}],
    ids=["full", "adapted", "eager"],
)
def test_the_page_describes_the_family(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    described(monkeypatch, *page())
    found = compare.compared(CONFIG, Recipe(batch_size=2, seq_len=512, **fields))
    assert found.parting is None
    assert abs(found.error) < 0.1


def test_what_is_left_out_is_named_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    description, reader = page()
    described(monkeypatch, description.partition(MLP)[0], reader)
    config = {**CONFIG, "vocab_size": 1001}  # not what another test has compiled
    parting = compare.compared(config, Recipe(batch_size=2, seq_len=512)).parting
    assert parting is not None
    assert (parting.phase, parting.section, parting.what) == ("forward", "layer 0", "what it keeps")
    assert parting.first.startswith("aten.native_dropout.default in model.layers.0.mlp ")
    assert parting.first.endswith("only in the trace)")
