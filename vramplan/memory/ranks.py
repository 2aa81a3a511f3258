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

from vramplan.memory.allocator import rounded
from vramplan.memory.precision import Policy
from vramplan.memory.states import adapters_of, is_quantized, loaded_bytes
from vramplan.memory.values import ITEMSIZE
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import Tensor, inventory

OUTER = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "in_proj"),
    *("q_a_proj", "kv_a_proj_with_mqa", "Wqkv"),
)
NO_DECAY = ("norm", "bias")
PACKED = "packed"
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
    outer: bool = False
    """Its linear takes the layer's own (normed) input: queries, keys and values."""

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
    module = tensor.name.removesuffix(".weight").rpartition(".")[2]
    yield Weight(tensor.numel, width, layer, trains, tensor.role, packed, module in OUTER)
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


def groups_of(weights: Sequence[Weight], apart: bool) -> list[list[Weight]]:
    """The optimizer's groups of trained parameters; `apart`: Trainer's, which exempt norms and
    biases from weight decay (transformers 5.17, trainer.py, get_decay_parameter_names)."""
    trained = [w for w in weights if w.trains]
    if not apart:
        return [trained]
    found = [[w for w in trained if (w.role in NO_DECAY) is small] for small in (False, True)]
    return [group for group in found if group]


def flat_of(
    groups: Sequence[Sequence[Weight]],
    ranks: int,
    owned: Sequence[tuple[Weight, int]],
    unit: int = 1,
) -> Flat:
    """A rank's partitions, one of each group, which hold what `owned_of` says.

    `unit`: with parameter_alignment each parameter but the last is padded to so many elements.
    """
    total = 0
    for group in groups:
        sizes = [w.numel for w in group]
        count = sum(-(-n // unit) * unit for n in sizes[:-1]) + sizes[-1]
        step = ALIGNMENT * ranks
        total += -(-count // step) * step
    mine = [(w, n) for w, n in owned if n]
    return Flat(
        total,
        total // ranks,
        sum(w.numel for w, _ in mine),
        max((n for _, n in mine), default=0),
        max(w.numel for group in groups for w in group),
        max((w.layer for w, _ in mine), default=-1),
    )


def owned_of(
    groups: Sequence[Sequence[Weight]], ranks: int, rank: int, unit: int = 1
) -> Iterator[tuple[Weight, int]]:
    """Each trained parameter, and how many of its elements are in the rank's partitions."""
    for group in groups:
        sizes = [w.numel for w in group]
        count = sum(-(-n // unit) * unit for n in sizes[:-1]) + sizes[-1]
        part = -(-count // (ALIGNMENT * ranks)) * ALIGNMENT
        first, behind, passed = rank * part, (rank + 1) * part, 0
        for w in group:
            yield w, max(0, min(passed + w.numel, behind) - max(passed, first))
            passed += -(-w.numel // unit) * unit


def dealt(group: Sequence[Weight], ranks: int) -> list[Weight]:
    """round_robin_gradients: _round_robin_reorder deals the parameters of a group to the ranks."""
    return [w for rank in range(min(ranks, len(group))) for w in group[rank::ranks]]


@lru_cache(maxsize=256)
def partitioned(arch: Architecture, policy: Policy, allocator: str) -> tuple[Weight, ...]:
    """Weights as stage 3 sees them: bitsandbytes' packed ones are parameters of bytes, and what
    their quantization needs besides stays whole. Int8Params keeps all of its weight at `CB`."""
    out = []
    for w in weights_in_order(arch, policy, allocator):
        if w.packed and w.role != "buffer":
            numel = w.numel if policy.quantization == "int8" else -(-w.numel // 2)
            out.append(Weight(numel, 1, w.layer, False, PACKED, 0, w.outer))
            kept = 0 if policy.quantization == "int8" else rounded(numel, allocator)
            out.append(Weight(0, 1, w.layer, False, "buffer", w.packed - kept))
        else:
            out.append(w)
    return tuple(out)


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
