"""Estimate beside trace: they agree, and where they don't, the place is found."""

from __future__ import annotations

from typing import Any

import pytest

from vramplan.models.blocks.llama import Llama
from vramplan.recipe.recipe import LoRA, Recipe
from vramplan.reports.comparison import Comparison, Side, percent, render

pytest.importorskip("torch")
pytest.importorskip("transformers")

from vramplan_launcher.trace import compare, stretches

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
RECIPE = Recipe(batch_size=2, seq_len=512)


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe(batch_size=2, seq_len=512, lora=LoRA(), gradient_checkpointing=True)]
)
def test_they_agree_in_every_section_and_category(recipe: Recipe) -> None:
    found = compare.compared(LLAMA, recipe)
    assert found.parting is None
    assert abs(found.error) < 0.05
    near = 64 * 512  # scalars
    for category, size in found.trace.breakdown.items():
        assert found.estimate.breakdown[category] == pytest.approx(size, rel=0, abs=near), category
    assert sum(found.trace.breakdown.values()) == found.trace.peak_allocated


def test_what_a_description_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward that is squared keeps its output: 2 x 512 x 256 in 16 bits, 512 KiB."""
    inner = Llama.mlp

    def mlp(self: Any, x: Any, name: str) -> Any:
        out = inner(self, x, name)
        return out * out

    monkeypatch.setattr(Llama, "mlp", mlp)
    config = {**LLAMA, "vocab_size": 1001}  # not what another test has compiled
    parting = compare.compared(config, RECIPE).parting
    assert parting is not None
    assert (parting.phase, parting.section, parting.what) == ("forward", "layer 0", "what it keeps")
    assert parting.estimate - parting.trace == pytest.approx(2 * 512 * 256 * 2, abs=4096)
    assert parting.first.startswith("dense forward in Llama.mlp (512.0 KiB, only in the estimate")
    assert "model.layers.0.mlp" in parting.first  # after which of the trace's
    assert parting.only_in_estimate[0].startswith("512.0 KiB: ")
    assert parting.only_in_trace == ()


def test_what_a_description_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's silu keeps 2 x 512 x 704 in 16 bits, 1.4 MiB."""
    monkeypatch.setattr(Llama, "activation", lambda self, x: x)
    parting = compare.compared({**LLAMA, "vocab_size": 1002}, RECIPE).parting
    assert parting is not None
    assert (parting.phase, parting.section) == ("forward", "layer 0")
    assert parting.first == (
        "aten.silu.default in model.layers.0.mlp.act_fn [2, 512, 704] bfloat16 "
        "(1.4 MiB, only in the trace)"
    )


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.3", 3),
        ("base_model.model.model.layers.12.mlp.experts.4", 12),
        ("transformer.h.0.attn", 0),
        ("lm_head", None),
        ("", None),
    ],
)
def test_the_layer_is_the_first_number(module: str, layer: int | None) -> None:
    assert stretches.layer_of(module) == layer


def test_the_report_is_readable() -> None:
    side = Side(
        peak_allocated=2**30,
        peak_phase="backward",
        phases={"backward": (2**29, 2**30)},
        breakdown={"parameter": 2**30, "buffer": 0},
    )
    shown = render(
        Comparison(id="m", recipe={}, estimate=side, trace=side, parting=None, tolerance=2**20)
    )
    assert "m: estimate +0.000 % against trace" in shown
    assert "They don't part" in shown
    assert "communication" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_percent_of_nothing() -> None:
    assert percent(0, 0) == 0.0
    assert percent(1, 0) == 100.0
    assert percent(3, 2) == 50.0
