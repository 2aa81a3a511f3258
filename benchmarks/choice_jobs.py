"""The jobs whose plans are held against every sensible recipe, run for real on a capped card.

    python benchmarks/choice_jobs.py RUNS.json    # what benchmarks/real_runs.py is to run

Sensible is what `fit` evaluates: every micro-batch, checkpointing, dtype, double quantization and
optimizer that a goal leaves open. Of those, the ones that are said to fit, and the ones that miss
by little. With each goes what was predicted of it before it ran.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vramplan import Goal, LoRA, fit
from vramplan.hardware.catalogue import find
from vramplan.hardware.gpu import Gpus
from vramplan.planner.candidates import Candidate
from vramplan.timing.step import step_time
from vramplan.units import GIB

CARDS = ("h100-80gb", "h200-141gb")
"""Those that ran them."""
CAPS = (24, 48)
CONFIGS: dict[str, dict[str, Any]] = {
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
}
"""Models that are not bundled."""
NEAR_MISS = 1.03
"""Recipes that need so many times what a card has are run on it too: do they fail?"""
PAGED = GIB // 2
"""More than so much is not paged out: a capped allocator leaves the card's memory to managed
memory, so nothing would be paged, and the time would be another one's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, a method and what the user fixes."""

    model: str
    method: str
    seq_len: int
    rank: int | None = None
    dropout: float = 0.05
    effective_batch: int = 8

    @property
    def source(self) -> str | dict[str, Any]:
        """As `fit` takes the model: a bundled name, or a config."""
        return CONFIGS.get(self.model, self.model)

    @property
    def goal(self) -> Goal:
        lora = None if self.rank is None else LoRA(rank=self.rank, dropout=self.dropout)
        return Goal(
            methods=(self.method,),
            seq_len=self.seq_len,
            effective_batch=self.effective_batch,
            lora=lora,
        )

    @property
    def name(self) -> str:
        return f"{self.model.split('/')[-1]} {self.method}"


JOBS = (
    Job(model="meta-llama/Llama-3.1-8B", method="lora", seq_len=1024, rank=16),
    Job(model="meta-llama/Llama-3.1-8B", method="qlora", seq_len=1024, rank=16),
    Job(model="meta-llama/Llama-3.2-1B", method="full", seq_len=2048),
    Job(model="google/gemma-3-1b-pt", method="full", seq_len=1024),
    Job(model="google/gemma-2-2b", method="lora", seq_len=1024, rank=16),
    Job(model="meta-llama/Llama-3.1-8B", method="int8", seq_len=1024, rank=16),
    Job(model="OLMoE-1B-7B", method="lora", seq_len=1024, rank=16, dropout=0.0),
)


def card(cap: int, name: str = CARDS[0]) -> Gpus:
    """The card that runs them, with less memory."""
    return Gpus(gpu=replace(find(name), memory=cap * GIB, usable=cap * GIB))


def sensible(job: Job, cap: int, name: str = CARDS[0]) -> Iterator[Candidate]:
    """The candidates of a job that stay on the card, or nearly fit it."""
    for found in fit(job.source, card(cap, name), job.goal).candidates:
        if found.required is None or found.recipe.deepspeed is not None or found.at_least:
            continue
        if found.required <= NEAR_MISS * cap * GIB and found.paged_out <= PAGED:
            yield found


def runs_of(job: Job) -> list[dict[str, Any]]:
    """Each recipe once, under the smallest card that it might fit."""
    caps: dict[str, list[int]] = {}
    recipes = {}
    for cap in CAPS:
        for found in sensible(job, cap):
            key = json.dumps(found.recipe.to_dict(), sort_keys=True)
            recipes[key] = found.recipe
            caps.setdefault(key, []).append(cap)
    out = []
    for key, recipe in recipes.items():
        from vramplan.memory.estimate import estimate, resolve

        gpus = card(80)
        out.append(
            {
                "id": f"{job.name} {len(out)}",
                "model": job.source,
                "recipe": recipe.to_dict(),
                "caps": caps[key],
                "steps": 4,
                "predicted": {
                    "seconds": step_time(resolve(job.source)[1], recipe, gpus).seconds,
                    "required": estimate(job.source, recipe, gpus).required,
                    "peak_allocated": estimate(job.source, recipe, gpus).peak_allocated,
                },
            }
        )
    return out


def main() -> None:
    runs = [run for job in JOBS for run in runs_of(job)]
    Path(sys.argv[1]).write_text(json.dumps(runs, indent=1), encoding="utf-8")
    total = sum(run["predicted"]["seconds"] * run["steps"] for run in runs)
    print(f"{len(runs)} runs, {total:.0f} s of steps")


if __name__ == "__main__":
    main()
