"""What a rank keeps on its host: pinned and pageable memory, and files on NVMe.

Sources: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (__init__, initialize_optimizer_states,
async_accumulate_grad_in_cpu_via_gpu), runtime/zero/stage3.py (_create_fp32_partitions,
initialize_optimizer_states, _create_param_groups_fp16_flat_cpu_memory), ops/adam/cpu_adam.py,
runtime/zero/offload_config.py (buffer_count, buffer_size, max_in_cpu); torch 2.11-2.13,
aten/src/ATen/core/CachingHostAllocator.h (by default; pinned_max_round_threshold_mb).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vramplan.memory.ranks import Flat, Weight, partition, sub_groups
from vramplan.recipe.deepspeed import DeepSpeed

FP32 = 4
ADAM = 2  # DeepSpeedCPUAdam's exp_avg and exp_avg_sq: fp32, pageable (torch.zeros_like)
OPTIMIZER_BUFFERS = 4  # offload_optimizer.buffer_count
PARAM_BUFFERS = 5  # offload_param.buffer_count
MAX_IN_CPU = 1_000_000_000  # offload_param.max_in_cpu: elements that stay on the host
PARAM_BUFFER = 100_000_000  # offload_param.buffer_size: elements


class Host(NamedTuple):
    """Bytes of one rank; a node needs as much for each of its ranks."""

    pinned: int = 0
    """Page-locked, as torch's allocator hands it out: rounded up to a power of two."""
    pageable: int = 0
    nvme: int = 0
    loading: int = 0
    """While from_pretrained runs: stages 0 to 2 load every weight on the host, in every rank."""


def pinned(nbytes: int) -> int:
    """CachingHostAllocatorImpl::allocate rounds to PowerOf2Ceil."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def host_of(
    zero: DeepSpeed,
    weights: Sequence[Weight],
    flat: Flat,
    ranks: int,
    width: int,
    accumulation: int,
    owned: Sequence[int],
) -> Host:
    """The host memory of a rank. `width`: bytes of an element of the engine's weights; `owned`:
    bytes of the parameters of which the rank owns a part."""
    if zero.stage < 3:
        quantized = any(w.packed and w.role != "buffer" for w in weights)  # loaded on the GPU
        loading = sum(w.nbytes for w in weights if w.role != "adapter" and not w.packed)
        loading = 0 if quantized else loading
        locked, loose = _stages_1_and_2(zero, flat, width)
        if locked and accumulation > 1 and zero.stage == 2:  # async_accumulate_grad_in_cpu_via_gpu
            locked += owned
        return _host(zero, locked, loose, 0, loading)
    groups = sub_groups(weights, ranks, zero.sub_group_size)
    locked, loose, files = [], 0, 0
    if zero.offload_optimizer is not None:
        locked.append(sum(groups) * width)  # grad_partitions_flat_buffer
    if zero.offload_optimizer == "cpu":
        locked += [n * FP32 for n in groups]  # the gradients in fp32
        loose += sum(groups) * FP32 * (1 + ADAM)  # masters and states
    if zero.offload_optimizer == "nvme":
        files += sum(groups) * FP32 * (2 + ADAM)  # masters, gradients and states
        locked += [max(groups) * FP32] * OPTIMIZER_BUFFERS
    frozen = [
        partition(w.numel, ranks) * w.itemsize for w in weights if not (w.trains or w.packed)
    ]
    if zero.offload_param == "cpu":
        locked += [sum(groups) * width, *frozen]
    if zero.offload_param == "nvme":
        near = min(sum(groups), MAX_IN_CPU)
        locked += [near * width, PARAM_BUFFERS * PARAM_BUFFER * width]
        for n in groups:  # a group that has no room in the flat buffer is on NVMe whole
            files += 0 if n <= near else n * width
            near -= n if n <= near else 0
        files += sum(frozen)
    return _host(zero, locked, loose, files, 0)


def _stages_1_and_2(
    zero: DeepSpeed, flat: Flat, width: int
) -> tuple[list[int], int]:
    if zero.offload_optimizer is None:
        return [], 0
    # masters, weights on their way back, gradients in fp32, the largest gradient
    locked = [flat.part * FP32, flat.part * width, flat.part * FP32, flat.largest * width]
    return locked, flat.part * FP32 * ADAM


def _host(zero: DeepSpeed, locked: Iterable[int], loose: int, files: int, loading: int) -> Host:
    if not zero.pin_memory:
        return Host(0, loose + sum(locked), files, loading)
    return Host(sum(map(pinned, locked)), loose, files, loading)
