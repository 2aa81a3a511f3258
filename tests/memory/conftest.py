"""The closed form against the trace: transformers' own code on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vramplan import Recipe
from vramplan.memory.precision import policy_of
from vramplan.memory.program import compile_step
from vramplan.models.hf_config import architecture


@pytest.fixture
def agrees_with_trace() -> Callable[[dict[str, Any], Recipe], None]:
    """Holds end and peak of forward and backward to a thousandth of the step's peak."""
    tracing = pytest.importorskip("vramplan_launcher.trace.steps")

    def hold(config: dict[str, Any], recipe: Recipe) -> None:
        traced = tracing.trace(config, recipe).step(2)
        forward, backward = traced["forward"], traced["backward"]
        start = forward.start
        expected = [p - start for p in (forward.end, forward.peak, backward.end, backward.peak)]

        arch = architecture(config)
        points = compile_step(arch, policy_of(recipe, arch)).walk(recipe.batch_size, recipe.seq_len)
        ahead = [p for p in points if p.section.phase == "forward"]
        back = [p for p in points if p.section.phase == "backward"]
        found = [ahead[-1].end, max(p.peak for p in ahead), back[-1].end, max(p.peak for p in back)]
        assert found == pytest.approx(expected, rel=0, abs=max(expected) / 1000)

    return hold
