"""Layers of a kind are run once: the program is the one of all that would have been run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.memory.kinds import record_kinds
from vramplan.memory.precision import Policy
from vramplan.memory.program import reduce_recording
from vramplan.memory.record import Recorder, layers_to_run, record_on, record_step
from vramplan.memory.zero_tape import Hooks, ZeroRecorder
from vramplan.models import catalogue
from vramplan.models.architecture import Architecture
from vramplan.models.hf_config import architecture

POLICIES = {
    "full": Policy(),
    "checkpointing": Policy(checkpointing=True),
    "accumulating": Policy(accumulating=True),
    "fp32 weights": Policy(dtype="fp32", single_sequence=True),
    "eager": Policy(attention="eager", checkpointing=True),
    "lora": Policy(rank=8, targets="all-linear", lora_dropout=0.1),
    "qlora": Policy(rank=8, targets="all-linear", quantization="nf4", checkpointing=True),
    "int8": Policy(rank=8, targets=("q_proj",), quantization="int8"),
}
PATTERNS = ("sssssf" * 4 + "ss", "ssf" * 5, "fssss" * 3 + "s", "sf" * 6, "ssfsfssf", "s" * 9)


def gemma(pattern: str) -> Architecture:
    """A small Gemma 3 whose layers are sliding or full."""
    checkpoint = catalogue.load("google/gemma-3-1b-pt")
    assert checkpoint is not None
    kinds = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]
    small = {"vocab_size": 640, "hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    sizes = {**small, "num_hidden_layers": len(kinds), "layer_types": kinds, "sliding_window": 64}
    return architecture({**checkpoint.config, **sizes})


def layers_run(arch: Architecture, recorder: Recorder) -> int:
    """How many layers' forward is recorded."""
    record_kinds(lambda: recorder, arch)
    return sum(mark.name.startswith("layer") and mark.phase == "forward" for mark in recorder.marks)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_program_is_the_same(pattern: str, policy: str) -> None:
    arch = gemma(pattern)
    for beyond_window in (False, True):  # the kinds differ beyond it
        chosen = replace(POLICIES[policy], beyond_window=beyond_window)
        spared = reduce_recording(record_kinds(lambda: Recorder(chosen), arch))  # noqa: B023
        assert spared == reduce_recording(record_step(arch, chosen))


@pytest.mark.parametrize("bucket", [1_000, 300_000, 700_000, 5_000_000, 500_000_000])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_program_is_the_same_under_zero(stage: int, bucket: int, contiguous: bool) -> None:
    """Also where a bucket fills now in one layer, now in another: then all layers are run."""
    arch = gemma(PATTERNS[0])
    for checkpointing in (False, True):
        policy = Policy(checkpointing=checkpointing, beyond_window=True)
        hooks = Hooks(stage, bucket, not contiguous, contiguous, False, True, bucket > 1_000_000)
        spared = reduce_recording(record_kinds(lambda: ZeroRecorder(policy, hooks), arch))  # noqa: B023
        assert spared == reduce_recording(record_on(ZeroRecorder(policy, hooks), arch))


DIFFERING = Policy(beyond_window=True)


def test_fewer_layers_are_run() -> None:
    """Of each kind the first, and one more; and the last of all."""
    arch = gemma(PATTERNS[0])
    would = sum(len(layers) for layers, _ in layers_to_run(list(PATTERNS[0])))
    assert (would, layers_run(arch, Recorder(DIFFERING))) == (14, 5)
    assert layers_run(gemma("sf" * 6), Recorder(DIFFERING)) == 3  # nothing is spared


def test_all_are_run_where_unlike_things_pass_between_them() -> None:
    """Here something that a recorder says of itself."""

    class Uneven(Recorder):
        def state(self) -> tuple[int, ...]:
            return (len(self.bounds),)

    made: list[Uneven] = []

    def make() -> Uneven:
        made.append(Uneven(DIFFERING))
        return made[-1]

    arch = gemma(PATTERNS[0])
    assert record_kinds(make, arch) == record_step(arch, DIFFERING)
    assert len(made) == 2
