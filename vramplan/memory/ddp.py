"""torch's DistributedDataParallel, as accelerate wraps Trainer's model: what it adds on a rank.

Everything is whole on each rank. DDP adds a flat copy of all gradients (its buckets), and, where it
looks for unused parameters, a copy of the outputs in each forward.

Sources: torch 2.11-2.13, nn/parallel/distributed.py (_ddp_init_helper, _sync_module_states,
_DDPSink) and torch/csrc/distributed/c10d/reducer.cpp (initialize_buckets, rebuild_buckets,
compute_bucket_assignment_by_size), comm.cpp (broadcast_coalesced); transformers 5.17, trainer.py
(create_accelerator_and_postprocess); accelerate 1.15, utils/dataclasses.py
(DistributedDataParallelKwargs: gradient_as_bucket_view=False).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from vramplan.memory.allocator import rounded
from vramplan.memory.precision import Policy
from vramplan.memory.ranks import Weight, weights_in_order
from vramplan.models.architecture import Architecture
from vramplan.units import MIB

if TYPE_CHECKING:
    from vramplan.memory.timeline import Parts

FIRST_BUCKET = MIB
"""_DEFAULT_FIRST_BUCKET_BYTES: the bucket of the gradients that come first."""
BUCKET = 25 * MIB
"""bucket_cap_mb."""
BROADCAST = 250 * MIB
"""broadcast_bucket_size: weights that the first rank sends to the others at once."""


class Replica(NamedTuple):
    """Bytes that DDP adds on every rank."""

    buckets: int
    """From wrapping on: gradients are copied into them and reduced there."""
    broadcast: int
    """While the model is wrapped: two flat copies of weights that are on their way."""


@lru_cache(maxsize=256)
def replica(arch: Architecture, policy: Policy, allocator: str) -> Replica:
    """What DDP adds for `arch` under `policy`; neither batch nor ranks change it."""
    weights = weights_in_order(arch, policy, allocator)
    trained = [(w.nbytes, w.itemsize) for w in reversed(weights) if w.trains]
    groups = assigned(trained, FIRST_BUCKET, BUCKET)
    return Replica(sum(rounded(sum(g), allocator) for g in groups), _broadcast(weights, allocator))


def replicated(run: Parts, added: Replica) -> Parts:
    """`run` with what DDP adds on each rank."""
    whole = run.layout
    peak = max(whole.prepare_peak, whole.weights + max(added.broadcast, added.buckets))
    return run._replace(layout=whole._replace(prepare_peak=peak), buckets=added.buckets)


def _broadcast(weights: Sequence[Weight], allocator: str) -> int:
    """The largest two neighbours of the flat copies; a weight that goes alone is not copied."""
    groups = assigned([(w.nbytes, 1 if w.packed else w.itemsize) for w in weights], BROADCAST)
    flat = [rounded(sum(group), allocator) if len(group) > 1 else 0 for group in groups]
    return max([*flat[:1], *(one + two for one, two in pairwise(flat))])


def assigned(sizes: Iterable[tuple[int, int]], *limits: int) -> list[list[int]]:
    """compute_bucket_assignment_by_size: (bytes, kind) to buckets, each of one kind.

    A bucket is closed when it has reached its limit; the first of a kind has the first limit, all
    others the last. In the order of what is first in each.
    """
    open_: dict[int, tuple[int, list[int]]] = {}
    passed: dict[int, int] = {}
    closed: list[tuple[int, list[int]]] = []
    for index, (nbytes, kind) in enumerate(sizes):
        _, bucket = open_.setdefault(kind, (index, []))
        bucket.append(nbytes)
        limit = limits[min(passed.get(kind, 0), len(limits) - 1)]
        if sum(bucket) >= limit:
            closed.append(open_.pop(kind))
            passed[kind] = passed.get(kind, 0) + 1
    closed += open_.values()
    return [bucket for _, bucket in sorted(closed)]
