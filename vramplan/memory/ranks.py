"""What a rank owns under ZeRO: parameters in the model's order, and how they are divided.

Sources: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (get_partition_info,
get_data_parallel_partitions), runtime/zero/stage3.py (_create_fp16_sub_groups),
runtime/zero/partition_parameters.py (_partition_numel), runtime/zero/parameter_offload.py
(mark_persistent_parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from vramplan.memory.precision import Policy
from vramplan.memory.states import adapters_of, is_quantized, loaded_bytes
from vramplan.memory.values import ITEMSIZE
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import Tensor, inventory

ALIGNMENT = 2  # nccl_start_alignment_factor: 4 bytes of 16-bit elements


class Weight(NamedTuple):
    """One parameter. `layer`: -1 before the layers, their number behind them."""

    numel: int
    itemsize: int
    layer: int
    trains: bool
    role: str
    packed: int = 0
    """Bytes as loaded, of a quantized weight or a buffer: neither is cast nor partitioned."""

    @property
    def nbytes(self) -> int:
        return self.packed or self.numel * self.itemsize


@lru_cache(maxsize=256)
def weights_in_order(arch: Architecture, policy: Policy, allocator: str) -> tuple[Weight, ...]:
    """Every parameter and buffer, in the order of model.parameters() by layers."""
    before: list[Weight] = []
    behind: list[Weight] = []
    inner: dict[int, list[Weight]] = {}
    for tensor in inventory(arch):
        if not tensor.layers:
            layer, place = (arch.layers, behind) if inner else (-1, before)
            place += _weights(tensor, policy, allocator, layer)
        for layer in tensor.layers:
            inner.setdefault(layer, []).extend(_weights(tensor, policy, allocator, layer))
    return (*before, *(w for layer in sorted(inner) for w in inner[layer]), *behind)


def _weights(tensor: Tensor, policy: Policy, allocator: str, layer: int) -> Iterator[Weight]:
    width = ITEMSIZE[tensor.dtype or policy.weight_dtype]
    trains = policy.trains_base and tensor.role != "buffer"
    packed = 0
    if tensor.role == "buffer" or is_quantized(tensor, policy):
        packed = loaded_bytes(tensor, policy, allocator)
    yield Weight(tensor.numel, width, layer, trains, tensor.role, packed)
    for adapter in adapters_of((tensor,), policy):
        yield Weight(adapter.numel, adapter.itemsize, layer, True, "adapter")


class Flat(NamedTuple):
    """The flat trained parameters of stages 1 and 2, from the side of one rank."""

    total: int
    """Elements, aligned to the ranks."""
    part: int
    owned: int
    """Elements of the parameters that lie in the partition, if only in part."""
    largest_owned: int
    """Elements in the partition, of a single parameter."""
    largest: int
    until: int
    """The layer behind which no parameter is owned; -1: none of a layer is."""


def flat_of(weights: Sequence[Weight], ranks: int, rank: int = 0) -> Flat:
    """A rank's partition. The first rank's gradients come last in backward."""
    count = sum(w.numel for w in weights if w.trains)
    step = ALIGNMENT * ranks
    total = -(-count // step) * step
    part = total // ranks
    mine = [(w, n) for w, n in owned_of(weights, part, rank) if n]
    return Flat(
        total,
        part,
        sum(w.numel for w, _ in mine),
        max((n for _, n in mine), default=0),
        max(w.numel for w in weights if w.trains),
        max((w.layer for w, _ in mine), default=-1),
    )


def owned_of(weights: Sequence[Weight], part: int, rank: int) -> Iterator[tuple[Weight, int]]:
    """Each trained parameter, and how many of its elements are in the rank's partition."""
    first, behind, passed = rank * part, (rank + 1) * part, 0
    for w in weights:
        if w.trains:
            yield w, max(0, min(passed + w.numel, behind) - max(passed, first))
            passed += w.numel


def partition(numel: int, ranks: int) -> int:
    """Stage 3 partitions each parameter by itself, padded to the ranks."""
    return -(-numel // ranks)


def sub_groups(weights: Sequence[Weight], ranks: int, size: int) -> list[int]:
    """Elements of a rank in each of the groups that stage 3 steps one after the other."""
    parts = [partition(w.numel, ranks) for w in weights if w.trains]
    total = sum(parts)
    if size >= total:
        return [total]
    groups, current = [], 0
    for n in parts:
        current += n
        if current >= size:
            groups.append(current)
            current = 0
    return [*groups, current] if current else groups
