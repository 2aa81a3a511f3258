"""DDP: buckets, what wrapping costs, and the clone of the outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from measured import runs

from vramplan.memory.allocator import NCCL_DDP
from vramplan.memory.ddp import assigned
from vramplan.memory.estimate import estimate
from vramplan.memory.explain import explain
from vramplan.recipe.recipe import LoRA, Recipe

LLAMA = next(run.config for run in runs("deepspeed_rank0") if run.case["model"] == "llama32_1b")
N = 1_235_814_400  # its parameters
VOCABULARY = 128_256
MIB = 2**20


def both(**fields):
    """Estimates for one GPU and for one of eight."""
    return estimate(LLAMA, Recipe(**fields)), estimate(LLAMA, Recipe(**fields, world_size=8))


@pytest.mark.parametrize("mixed", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_buckets_are_a_copy_of_all_gradients(dtype, mixed):
    if (dtype, mixed) == ("bf16", "fp16"):
        return  # torch's scaler refuses 16-bit gradients
    alone, one = both(dtype=dtype, mixed_precision=mixed, gradient_checkpointing=True)
    assert one.parts.buckets == N * (2 if dtype == "bf16" else 4)
    assert one.timeline.resident - alone.timeline.resident == one.parts.buckets
    assert one.timeline.optimizer_step.end - alone.timeline.optimizer_step.end == one.parts.buckets


def test_adapters_have_small_buckets():
    alone, one = both(lora=LoRA(rank=8))
    assert one.parts.buckets == alone.trainable_parameters * 4


def test_outputs_are_cloned_where_unused_parameters_are_looked_for():
    """Trainer does not look where a model of its own is checkpointed; peft's is none of its own."""
    size = VOCABULARY * 2048 * 4

    def cloned(**fields):
        alone, one = both(**fields)
        ahead = one.timeline.forward.peak - alone.timeline.forward.peak - one.parts.buckets
        assert one.policy.copies_outputs is (ahead > 0 or "ddp_find" in " ".join(one.warnings))
        return ahead

    assert 0 < cloned() <= size
    assert 0 < cloned(lora=LoRA(), gradient_checkpointing=True) <= size
    assert cloned(gradient_checkpointing=True) == 0
    _, one = both()
    assert any("ddp_find_unused_parameters=False" in warning for warning in one.warnings)


def test_accumulation_needs_nothing_more():
    """no_sync: gradients stay where they are, and the buckets with them."""
    alone, one = both(gradient_accumulation_steps=4, gradient_checkpointing=True)
    assert one.peak_allocated - alone.peak_allocated == one.parts.buckets


@pytest.mark.parametrize("ranks", [2, 64, 4096])
def test_every_rank_needs_the_same(ranks):
    recipe = Recipe(world_size=ranks)
    assert estimate(LLAMA, recipe).peak_allocated == both()[1].peak_allocated
    assert estimate(LLAMA, recipe).overhead["nccl"] == NCCL_DDP


@pytest.mark.parametrize("lora", [None, LoRA()])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_breakdown_and_explanation_add_up(lora, checkpointing, accumulation):
    recipe = Recipe(
        world_size=2,
        lora=lora,
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
    )
    e = estimate(LLAMA, recipe)
    assert sum(e.breakdown.values()) == e.peak_allocated
    assert min(e.breakdown.values()) >= 0
    assert e.breakdown["buffer"] == e.parts.buckets
    assert sum(term.bytes for term in explain(e).terms) == e.peak_allocated


def test_buckets_are_closed_when_they_are_full():
    """The first has a limit of its own; kinds are apart; in the order of their firsts."""
    sizes = [(600, 2), (500, 2), (100, 4), (900, 2), (200, 2), (100, 4)]
    assert assigned(sizes, 1000, 1000) == [[600, 500], [100, 100], [900, 200]]
    assert assigned(sizes, 500, 1000) == [[600], [500, 900], [100, 100], [200]]


def test_wrapping_sends_weights_in_flat_copies():
    """Two at a time, of 250 MiB or a little more; the embedding (501 MiB) goes alone, uncopied.

    LoRA of rank 8 on four layers: [q k v o gate up down, twice, q k v o] is 252 MiB, then adapters.
    """
    config = {**LLAMA, "num_hidden_layers": 4}
    e = estimate(config, Recipe(lora=LoRA(rank=16), world_size=4))
    layer = (8 + 2 + 2 + 8 + 32 + 32 + 32) * MIB + 2 * 2048 * 2
    flat = 2 * layer + (8 + 2 + 2 + 8) * MIB
    adapters = e.trainable_parameters * 4
    norms = e.timeline.prepare.peak - e.parts.layout.weights - flat - adapters
    assert 0 <= norms <= 3 * 2048 * 2  # a norm's weight falls on one side or the other
