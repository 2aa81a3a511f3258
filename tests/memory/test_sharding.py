"""ZeRO per rank: against real rank-0 runs, each on its own, and what must hold of any recipe."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from measured import phases_of, runs  # noqa: E402

from vramplan.memory.allocator import rounded  # noqa: E402
from vramplan.memory.estimate import estimate  # noqa: E402
from vramplan.memory.host import pinned  # noqa: E402
from vramplan.memory.ranks import flat_of, groups_of, sub_groups, weights_in_order  # noqa: E402
from vramplan.memory.zero_tape import compile_zero  # noqa: E402
from vramplan.models.hf_config import architecture  # noqa: E402
from vramplan.recipe.deepspeed import DeepSpeed  # noqa: E402
from vramplan.recipe.recipe import LoRA, Recipe  # noqa: E402

ALL = list(runs("deepspeed_rank0"))
WORST = 0.01
MEAN_ABSOLUTE = 0.001
LLAMA = next(run.config for run in ALL if run.case["model"] == "llama32_1b")
N = 1_235_814_400  # its parameters
E = 128_256 * 2048  # its embedding, tied to the head


def llama(stage=2, ranks=2, *, zero=None, **fields):
    settings = DeepSpeed(stage=stage, **(zero or {}))
    recipe = Recipe(**{"seq_len": 1024, **fields}, deepspeed=settings, world_size=ranks)
    return estimate(LLAMA, recipe, rank=0)


# --- against measured runs ------------------------------------------------------------------


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.id)
def test_peak(run):
    assert abs(run.estimate().peak_allocated / run.peak_allocated - 1) <= WORST


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.id)
def test_phases(run):
    """Ends and peaks, within 1 % of the run's peak. The harness sees backward and step as one."""
    phases = phases_of(run, run.estimate())
    off = {
        (name, what): measured - getattr(phases[name], what)
        for what, found in (("end", run.ends), ("peak", run.peaks))
        for name, measured in found.items()
        if name in ("load", "forward", "backward")
        and abs(measured - getattr(phases[name], what)) > WORST * run.peak_allocated
    }
    assert not off


def test_no_bias():
    errors = [run.estimate().peak_allocated / run.peak_allocated - 1 for run in ALL]
    assert sum(map(abs, errors)) / len(errors) <= MEAN_ABSOLUTE


# --- arithmetic -----------------------------------------------------------------------------


def test_stage_2_holds_whole_weights_and_a_part_of_the_rest():
    part = llama(2, 8).sharded
    assert part.weights == N * 2 + 2 * 512  # and two rotary tables, 32 fp32 values each
    assert part.masters == N // 8 * 4
    assert part.states == 2 * (N // 8 * 4)  # exp_avg, exp_avg_sq


def test_stage_3_holds_a_part_of_each_weight():
    part = llama(3, 8).sharded
    norms = 33 * 2048 * 2  # of at most 10 x 2048 elements: always whole
    assert part.weights == N // 8 * 2 + norms + 2 * 512
    assert part.gradients == N // 8 * 2
    assert part.buffers == 2048**2 * 2


def test_stage_0_holds_everything():
    part = llama(0, 4).sharded
    assert part.resident == N * (2 + 4 + 8) + 2 * 512


def test_step_of_stage_2():
    """The gradients of what is owned, flattened, and in fp32: the first rank owns the embedding."""
    part = llama(2, 2).sharded
    owned = E + 6 * 60_821_504  # the embedding, and layers to the one in which the half falls
    assert part.flat.part == N // 2
    assert owned - 60_821_504 < N // 2 <= part.flat.owned <= owned
    assert part.step == part.flat.owned * 2 + N // 2 * 2 + N // 2 * 4


def test_padding_to_ranks():
    policy = llama(2).policy
    weights = weights_in_order(architecture(LLAMA), policy, "expandable_segments")
    assert sum(w.numel for w in weights if w.trains) == N
    flat = flat_of(groups_of(weights, False), 3, ())
    assert flat.total == -(-N // 6) * 6  # two elements for each rank
    assert flat.part == flat.total // 3


def test_sub_groups_bound_the_step():
    policy = llama(3).policy
    weights = weights_in_order(architecture(LLAMA), policy, "expandable_segments")
    groups = sub_groups(weights, 2, 100_000_000)
    assert sum(groups) == N // 2
    assert groups[0] == E // 2  # one parameter alone is more than the group's size
    small = llama(3, zero={"sub_group_size": 100_000_000}).sharded
    assert small.step == (E // 2) * 8  # the norm in fp64; the step needs 2 + 4 bytes
    assert llama(3).sharded.step == (N // 2) * 2 + (N // 2) * 4


def test_optimizer_on_the_host():
    part = llama(2, 2, zero={"offload_optimizer": "cpu"}).sharded
    assert (part.masters, part.states, part.step) == (0, 0, 0)
    assert part.buffers == E * 2  # temp_grad_buffer_for_gpu_offload
    assert part.host.pageable == N // 2 * 8
    # masters, gradients in fp32, weights on their way back, the largest gradient
    assert part.host.pinned == 2 * pinned(N // 2 * 4) + pinned(N // 2 * 2) + pinned(E * 2)
    loose = llama(2, 2, zero={"offload_optimizer": "cpu", "pin_memory": False}).sharded.host
    assert loose.pinned == 0
    assert loose.pageable == N // 2 * (8 + 4 + 4 + 2) + E * 2


def test_pinned_memory_is_rounded_up():
    assert [pinned(n) for n in (0, 1, 512, 513)] == [0, 1, 512, 1024]


def test_all_on_nvme():
    all_of_it = {"offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "/nvme"}
    pool = {"param_buffer_size": E // 2, "optimizer_buffer_count": 6}
    part = llama(3, 2, zero={**all_of_it, **pool}).sharded
    assert part.host.nvme == N // 2 * 16  # the weights are fewer than max_in_cpu: on the host
    assert part.weights == 33 * 2048 * 2 + 2 * 512
    # gradients and weights, flat, and five buffers of weights by torch; six of a sub-group as is
    assert part.host.pinned == 2 * pinned(N // 2 * 2) + pinned(5 * E // 2 * 2) + 6 * (N // 2) * 4


# --- what must hold -------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(rank=16)], ids=["full", "lora"])
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_higher_stage_never_keeps_more(lora, ranks):
    """Persistent weights and the reduce bucket apart, which stage 3 alone keeps between steps."""

    def kept(stage):
        part = llama(stage, ranks, lora=lora).sharded
        return part.weights + part.masters + part.states

    slack = 64 * 2**20 if lora else 0  # adapters stay fp32 under stage 3, small ones whole
    stages = [kept(stage) for stage in range(4)]
    assert all(more <= less + slack for less, more in pairwise(stages))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_need_more(stage):
    peaks = [llama(stage, ranks).peak_allocated for ranks in (2, 4, 16, 256, 4096)]
    assert all(more <= less + rounded(2**20) for less, more in pairwise(peaks))


def test_ranks_share_one_recording():
    """The cost of an estimate does not grow with the ranks: the tape is recorded once, and once
    more where a bucket (2048 x 2048 elements) is longer than a partition: from 295 ranks on."""
    compile_zero.cache_clear()
    for ranks in (2, 8, 64, 294):
        llama(2, ranks)
    assert compile_zero.cache_info().misses == 1
    for ranks in (295, 1024, 4096):
        llama(2, ranks)
    assert compile_zero.cache_info().misses == 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_breakdown_adds_up(stage, dtype, accumulation):
    mixed = "no" if dtype == "fp32" else dtype
    needed = llama(
        stage, 4, dtype=dtype, mixed_precision=mixed, gradient_accumulation_steps=accumulation
    )
    worst = estimate(LLAMA, needed.recipe)
    for e in (needed, worst):
        assert sum(e.breakdown.values()) == e.peak_allocated
        assert min(e.breakdown.values()) >= 0
    assert worst.peak_allocated >= needed.peak_allocated


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_saves(stage):
    on_gpu, on_host = llama(stage), llama(stage, zero={"offload_optimizer": "cpu"})
    assert on_host.peak_allocated < on_gpu.peak_allocated
    assert on_gpu.sharded.host.pinned == 0 < on_host.sharded.host.pinned


def test_the_last_rank_fills_its_partition_first():
    """Its gradients' buffer is there while nearly all activations are; the first rank's is not."""
    zero = DeepSpeed(reduce_bucket_size=500_000_000)
    recipe = Recipe(batch_size=1, seq_len=1024, deepspeed=zero, world_size=2)
    worst, first = estimate(LLAMA, recipe), estimate(LLAMA, recipe, rank=0)
    assert worst.sharded.rank == 1
    assert worst.peak_allocated > first.peak_allocated
    assert estimate(LLAMA, recipe, rank=1).peak_allocated == worst.peak_allocated


def test_fewer_live_parameters_need_less():
    few = llama(3, zero={"stage3_max_live_parameters": 300_000_000})
    assert few.peak_allocated < llama(3).peak_allocated


def test_quantized_weights_stay_whole():
    needed = llama(2, quantization="nf4", lora=LoRA())
    again = replace(needed.recipe, world_size=64)
    assert estimate(LLAMA, again).sharded.weights == pytest.approx(needed.sharded.weights, rel=0.01)
    assert needed.sharded.weights < 1.4 * 2**30  # 0.52 B an element, embedding 2 B
