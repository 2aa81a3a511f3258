"""`make trace-matrix` in small: every family and every regime, a third of the pairs.

Each family has three or four of the regimes; they rotate over the families, as do checkpointing,
the attention and the points; test_drift.py has all families in two regimes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from tests.launcher.small_models import SMALL, WITHOUT_SDPA, config_of
from vramplan.errors import UserError
from vramplan.memory.estimate import estimate
from vramplan.models.hf_config import architecture
from vramplan.models.tensors import inventory
from vramplan.recipe.recipe import LoRA, Recipe

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

LIMIT = 0.005
"""Of the phase's bytes without workspaces, by which estimate and trace may differ."""
REGIMES: tuple[dict[str, Any], ...] = (
    {"mixed_precision": "no"},
    {"dtype": "fp32"},
    {"dtype": "fp32", "mixed_precision": "fp16"},
    {"lora": ("attention", 0.0)},
    {"lora": ("attention", 0.1)},
    {"lora": ("all-linear", 0.0)},
    {"lora": ("all-linear", 0.1)},
    {"lora": ("all-linear", 0.1), "quantization": "nf4"},
    {"lora": ("all-linear", 0.1), "quantization": "nf4", "double_quant": False},
    {"lora": ("all-linear", 0.1), "quantization": "int8"},
)
EVERY = 3
POINTS = ((2, 256), (1, 384))
VARIANTS = tuple(product(("sdpa", "eager"), (False, True), POINTS))


def cells() -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for place, family in enumerate(SMALL):
        for regime in REGIMES[place % EVERY :: EVERY]:
            attention, checkpointing, (batch, seq) = VARIANTS[number % len(VARIANTS)]
            number += 1
            yield (
                family,
                {
                    **regime,
                    "attention": "eager" if family in WITHOUT_SDPA else attention,
                    "gradient_checkpointing": checkpointing,
                    "batch_size": batch,
                    "seq_len": seq,
                },
            )


CELLS = tuple(cells())


def named(cell: tuple[str, dict[str, Any]]) -> str:
    family, fields = cell
    return "-".join([family, *(f"{value}" for value in fields.values() if value is not True)])


def recipe_of(fields: dict[str, Any], config: dict[str, Any]) -> Recipe:
    if "lora" not in fields:
        return Recipe(**fields)
    targets, dropout = fields["lora"]
    if architecture(config).experts is not None and targets == "all-linear":
        dropout = 0.0  # peft refuses dropout on experts
    if targets == "attention":
        linears = {
            tensor.name.removesuffix(".weight").split(".")[-1]
            for tensor in inventory(architecture(config))
            if tensor.adaptable and "att" in tensor.name.rpartition(".")[0].rpartition(".")[0]
        }
        targets = tuple(sorted(linears))
    return Recipe(**{**fields, "lora": LoRA(rank=4, dropout=dropout, target_modules=targets)})


def test_every_regime_meets_every_attention_and_checkpointing() -> None:
    for regime in REGIMES:
        met = [fields for _, fields in CELLS if regime.items() <= fields.items()]
        assert {f["attention"] for f in met} == {"sdpa", "eager"}
        assert {f["gradient_checkpointing"] for f in met} == {False, True}


@pytest.mark.parametrize("cell", CELLS, ids=named)
def test_the_estimate_is_the_trace(cell: tuple[str, dict[str, Any]]) -> None:
    """Peak and ends within LIMIT; what forward saves to the byte, but for int8's outliers."""
    from vramplan_launcher.trace import api

    family, fields = cell
    config = config_of(family)
    recipe = recipe_of(fields, config)
    try:
        needed = estimate(config, recipe)
    except UserError as error:
        pytest.skip(str(error))
    deep = api.run(config, recipe)
    traced = api.traced(deep, family, recipe)

    def close(mine: int, other: int, idle: int = traced.workspace) -> bool:
        return abs(mine - other) <= LIMIT * (other - idle)

    assert close(needed.peak_allocated, traced.peak_allocated)
    ends, expected = needed.timeline.phases(), traced.timeline.phases()
    for name, phase in expected.items():
        idle = 0 if name in ("load", "prepare") else traced.workspace
        assert close(ends[name].end, phase.end, idle), (name, ends[name], phase)
    forward = deep.trace.step(2)["forward"]
    saved = ends["forward"].end - needed.timeline.resident
    if recipe.quantization == "int8":
        assert saved == pytest.approx(forward.end - forward.start, rel=LIMIT)
    else:
        assert saved == forward.end - forward.start
