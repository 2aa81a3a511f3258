"""Stage 3's coordinator, run weight by weight: what is whole, and when."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from measured import runs

from vramplan.memory.gathering import always_whole, gathered
from vramplan.memory.precision import policy_of
from vramplan.memory.ranks import partitioned
from vramplan.models.hf_config import architecture
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

CONFIG = next(run.config for run in runs("deepspeed_rank0") if run.case["model"] == "llama32_1b")
UNTIED = architecture({**CONFIG, "tie_word_embeddings": False, "num_hidden_layers": 6})
H, E, LAYER = 2048, 128_256 * 2048, 60_817_408  # without its two norms
EVERYTHING = 2 * E + 6 * LAYER
PERSISTENT = 10 * H
NO_LIMIT = 2**62


def whole(*, live=10**12, reuse=10**12, prefetch=int(0.9 * H * H), saves=False, **fields):
    recipe = Recipe(**fields, deepspeed=DeepSpeed(stage=3), world_size=4)
    policy = policy_of(recipe, UNTIED)
    limits = (live, reuse, prefetch)
    found = gathered(UNTIED, policy, "expandable_segments", PERSISTENT, limits, NO_LIMIT, saves)
    return found


def test_without_a_limit_all_is_whole_when_the_loss_is_taken():
    """The prefetcher runs through forward's end into backward, back to the embedding."""
    assert whole().loss == 2 * EVERYTHING  # bytes: bf16


def test_the_limit_is_passed_by_one_weight():
    """In the layers' middle by one of theirs; where the head is next, by that."""
    found = whole(live=3 * LAYER, reuse=0)
    largest = 8192 * H
    assert 2 * (3 * LAYER - largest) < found.forward[1] <= 2 * (3 * LAYER + largest + H * H)
    most = max(*found.forward, *found.backward, *found.head, found.loss)
    assert 2 * E < most <= 2 * (3 * LAYER + 2 * E + largest)


def test_nothing_is_reused_at_a_distance_of_zero():
    """Without gathering ahead a layer has one weight at a time."""
    found = whole(live=0, reuse=0)
    largest = 2 * 8192 * H  # gate, up, down
    assert set(found.forward) == {largest} == set(found.backward)
    assert found.loss == 0
    assert found.head == (2 * E, 2 * E)


def test_without_prefetching_weights_come_when_they_are_asked_for():
    found = whole(reuse=0, prefetch=0)
    assert found.loss == 0
    assert found.inputs == (2 * E, 2 * E)


def test_frozen_weights_whose_input_has_no_gradient_are_not_asked_for_in_backward():
    """LoRA: the first layer's queries, keys and values (2048 + 512 + 512 rows), the embedding."""
    full = whole(lora=LoRA(target_modules=("o_proj",)))
    assert full.backward[0] < full.backward[1]
    assert full.inputs[1] == 0
    checkpointed = whole(lora=LoRA(target_modules=("o_proj",)), gradient_checkpointing=True)
    assert checkpointed.inputs[1] >= 2 * E


def test_a_saved_weight_outlives_its_release():
    """torch's own linear saves it: with reuse 0 it is gathered again for backward."""
    few = {"live": 0, "reuse": 0}
    kept, let_go = whole(saves=True, **few), whole(**few)
    assert kept.loss - let_go.loss == 2 * (6 * LAYER + E)  # the head's as well
    assert whole(saves=True, gradient_checkpointing=True, **few) == whole(
        gradient_checkpointing=True, **few
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_weights_stay_until_the_graph_is_let_go(checkpointing):
    """bitsandbytes' MatMul4Bit holds them on its context: partitioning saves nothing by then."""
    fields = {"quantization": "nf4", "gradient_checkpointing": checkpointing}
    found = whole(lora=LoRA(rank=8), **fields)
    packed = 6 * LAYER // 2
    first = 0 if checkpointing else (2048 + 512 + 512) * H // 2  # its input has no gradient
    assert found.graph == packed - first
    int8 = whole(lora=LoRA(rank=8), quantization="int8", gradient_checkpointing=checkpointing)
    assert int8.graph == 0


def test_weights_that_are_always_whole():
    policy = policy_of(Recipe(deepspeed=DeepSpeed(stage=3), world_size=4), UNTIED)
    weights = partitioned(UNTIED, policy, "expandable_segments")
    norms = [i for i, w in enumerate(weights) if w.role == "norm"]
    assert [i for i in sorted(always_whole(weights, PERSISTENT, NO_LIMIT)) if not weights[i].packed]
    assert set(norms) <= always_whole(weights, PERSISTENT, NO_LIMIT)
    few = always_whole(weights, PERSISTENT, 3 * H)  # stage3_model_persistence_threshold
    assert sum(weights[i].role == "norm" for i in few) == 3


def test_ranks_change_nothing():
    """Its cost and its result: gathered() does not know how many there are."""
    one = replace(Recipe(deepspeed=DeepSpeed(stage=3)), world_size=4096)
    assert policy_of(one, UNTIED) == policy_of(replace(one, world_size=2), UNTIED)
