"""Every described family against the installed transformers: what drifts is named.

A new release of transformers, peft or torch that changes what a model allocates fails here with the
family's name and the first section of the step where description and code part.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.launcher.small_models import SMALL, WITHOUT_SDPA, config_of
from vramplan.memory.estimate import estimate
from vramplan.models.blocks import FAMILIES
from vramplan.models.hf_config import READERS
from vramplan.recipe.recipe import LoRA, Recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

CRUMBS = ("prepare", "optimizer_step")
"""An estimate leaves out the draft of an expert's adapter and clipping's norms, a block each."""
SAME = {"gemma3": "gemma3_text"}
"""Read as another one's text model."""
REGIMES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapted": {"lora": LoRA(rank=8, dropout=0.0), "gradient_checkpointing": True},
}


def points(side: Any) -> dict[str, tuple[int, ...]]:
    return {
        name: (phase.end,) if name in CRUMBS else (phase.end, phase.peak)
        for name, phase in side.timeline.phases().items()
    }


def test_every_described_family_is_traced_here() -> None:
    assert {*SMALL} | {*SAME} == {*READERS}
    assert {*SMALL} == {*FAMILIES}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", SMALL)
def test_the_description_is_what_the_libraries_do(family: str, regime: str) -> None:
    """Ends and peaks within a thousandth of the peak.

    But for the peaks of the phases in CRUMBS.
    """
    from vramplan_launcher.trace import api, compare

    config = config_of(family)
    attention = "eager" if family in WITHOUT_SDPA else "sdpa"
    recipe = Recipe(batch_size=2, seq_len=256, **REGIMES[regime], attention=attention)
    needed = estimate(config, recipe)
    deep = api.run(config, recipe)
    traced = api.traced(deep, family, recipe)

    # Workspaces aside, so that they don't hide what a small model does.
    near = (traced.peak_allocated - traced.workspace) / 1000
    found, expected = points(needed), points(traced)
    off = [n for n in found if found[n] != pytest.approx(expected[n], rel=0, abs=near)]
    if off:
        parting = compare.first_parting(deep, config, recipe, None, int(near))
        pytest.fail(f"{family} has drifted in {', '.join(off)}: {found}, {expected}; {parting}")
    assert needed.parameters == traced.parameters
    assert needed.trainable_parameters == traced.trainable_parameters
