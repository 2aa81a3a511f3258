"""Terms of a peak under ZeRO: a rank's parts by name, what lives at the peak by category."""

from __future__ import annotations

from collections.abc import Iterator

from vramplan.memory.estimate import Estimate
from vramplan.memory.sharding import Sharded
from vramplan.memory.terms import Term

SOURCE = "DeepSpeed 0.19.8, runtime/zero/"
FILES = {0: "../fp16/fused_optimizer.py", 1: "stage_1_and_2.py", 2: "stage_1_and_2.py"}


def zero_terms(e: Estimate, part: Sharded) -> Iterator[Term]:
    """They add up to the estimate's peak."""
    stage = e.recipe.deepspeed.stage if e.recipe.deepspeed is not None else 0
    source = SOURCE + FILES.get(stage, "stage3.py")
    left = dict(e.breakdown)
    ranks = e.recipe.world_size
    if e.peak_phase not in ("load", "prepare"):
        parts = (
            ("parameter", "weights that stay", part.weights),
            ("optimizer", "masters in fp32", part.masters),
            ("optimizer", f"{e.recipe.optimizer}: states", part.states),
            ("buffer", "buckets that stay", part.buffers),
            ("gradient", "flat partition of the gradients", part.gradients),
        )
        for category, what, size in parts:
            left[category] -= size
            yield _term(category, what, f"of one of {ranks} ranks", size, source)
    gathered = "weights gathered" if stage == 3 else "weights"
    names = {
        "parameter": f"{gathered} at the peak",
        "gradient": "gradients at the peak",
        "buffer": "reduce buckets",
        "workspace": "cuBLAS workspaces",
        "temporary": f"copies in {e.peak_phase.replace('_', ' ')}",
        "logits": "logits, loss and their gradients",
        "activation": "activations and inputs",
        "optimizer": "optimizer",
    }
    for category, size in left.items():
        yield _term(category, names[category], "live at the peak", size, source)


def _term(category: str, what: str, formula: str, size: int, source: str) -> Term:
    return Term(
        category=category,
        what=what,
        formula=formula,
        figures=f"{size} B",
        bytes=size,
        source=source,
    )
