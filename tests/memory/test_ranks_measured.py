"""DDP and ZeRO against measured runs, each on its own: pretended ranks, and real ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from measured_ranks import FOLDER, RANKED, rank_runs  # noqa: E402

from vramplan.memory.estimate import estimate  # noqa: E402
from vramplan.recipe.deepspeed import DeepSpeed  # noqa: E402
from vramplan.recipe.recipe import Recipe  # noqa: E402

ALL = [run for name in RANKED for run in rank_runs(name)]
WORST = 0.022
MEAN_ABSOLUTE = 0.002
PHASES = 0.03
MIB = 2**20
MODELS = {
    name: config
    for file in RANKED
    for name, config in json.loads((FOLDER / f"{file}.json").read_text("utf-8"))["models"].items()
}


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.id)
def test_peak(run):
    assert abs(run.estimate().peak_allocated / run.peak_allocated - 1) <= WORST


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.id)
def test_phases(run):
    """Ends of all phases, and peaks of a step's, within 3 % of the run's peak."""
    found = run.estimate().timeline.phases()
    off = {}
    for name, measured in run.phases.items():
        pairs = [(measured.end, found[name].end)]
        if name in ("forward", "backward", "optimizer_step"):
            pairs.append((measured.peak, found[name].peak))
        for was, said in pairs:
            if abs(was - said) > PHASES * run.peak_allocated:
                off[name] = (was, said)
    assert not off


def test_no_bias():
    errors = [run.estimate().peak_allocated / run.peak_allocated - 1 for run in ALL]
    assert sum(map(abs, errors)) / len(errors) <= MEAN_ABSOLUTE


def test_what_is_covered():
    """At least thirty pretended runs and fifteen real ones, of every stage."""
    zero = [run.recipe.deepspeed for run in ALL if run.recipe.deepspeed is not None]
    assert {z.stage for z in zero} == {0, 1, 2, 3}
    assert {(z.stage, z.offload_optimizer) for z in zero if z.offload_optimizer} == {
        (1, "cpu"),
        (2, "cpu"),
        (3, "cpu"),
    }
    assert sum(not run.real for run in ALL) >= 30
    assert sum(run.real for run in ALL) >= 15
    assert max(run.recipe.world_size for run in ALL) == 4096


@pytest.mark.parametrize("run", [run for run in ALL if run.host_pinned], ids=lambda run: run.id)
def test_pinned_host_memory(run):
    """Within half a percent and a MiB: small tensors of Trainer's are pinned as well."""
    host = run.estimate().host
    said = host.pinned if host is not None else 0
    assert abs(said - run.host_pinned) <= MIB + 0.005 * run.host_pinned


@pytest.mark.parametrize("run", ALL, ids=lambda run: run.id)
def test_overhead(run):
    """CUDA context, kernels and NCCL: never too little, at most 24 MiB too much."""
    said = run.estimate().overhead
    most = said["context"] + (said["nccl"] if run.real else 0)
    assert 0 <= most - run.overhead <= 24 * MIB


def test_real_ranks_need_what_pretended_ones_do():
    """The same case with NCCL on two GPUs and with torch's fake group: the same to the byte."""
    pretended = {run.id: run.peak_allocated for run in ALL if not run.real}
    same = [
        (run.id, run.peak_allocated, pretended[run.id.replace("-real", "")])
        for run in ALL
        if run.real and run.id.replace("-real", "") in pretended
    ]
    assert len(same) >= 3
    assert all(real == other for _, real, other in same), same


def test_communicators():
    """DDP has one, DeepSpeed two: NVML's figures that overhead["nccl"] comes from."""
    document = json.loads((FOLDER / "deepspeed_gpu.json").read_text(encoding="utf-8"))
    several = [e for e in document["runs"] if e["real"] and e["case"]["ranks"] > 1]
    assert {e["communicators"] for e in several} == {2}
    document = json.loads((FOLDER / "ddp_gpu.json").read_text(encoding="utf-8"))
    assert {e["communicators"] for e in document["runs"] if e["real"]} == {1}
    for run in document["nccl"]:
        assert run["ranks"] == 2


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("name", ["gemma4", "falcon3", "mistral3", "llama1b4"])
def test_no_rank_needs_more_than_the_one_that_is_said_to(stage, offload, name):
    """A rank in the middle can: where an embedding ends it owns that and a layer's weights."""
    config = MODELS[name]
    zero = DeepSpeed(stage=stage, offload_optimizer=offload)
    for ranks in (2, 3, 8, 13):
        recipe = Recipe(seq_len=512, gradient_checkpointing=True, world_size=ranks, deepspeed=zero)
        each = [estimate(config, recipe, rank=rank).peak_allocated for rank in range(ranks)]
        assert max(each) <= 1.005 * estimate(config, recipe).peak_allocated
