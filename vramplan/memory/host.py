"""What a rank keeps on its host: pinned and pageable memory, and files on NVMe.

Sources: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (__init__, initialize_optimizer_states,
async_accumulate_grad_in_cpu_via_gpu), runtime/zero/stage3.py (_create_fp32_partitions,
initialize_optimizer_states, _create_param_groups_fp16_flat_cpu_memory), ops/adam/cpu_adam.py,
runtime/zero/offload_config.py, runtime/swap_tensor/ (SwapBufferManager: locked as they are;
AsyncPartitionedParameterSwapper); torch 2.11-2.13,
aten/src/ATen/core/CachingHostAllocator.h (by default; pinned_max_round_threshold_mb).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vramplan.memory.ranks import PACKED, Flat, Weight, partition, sub_groups
from vramplan.recipe.deepspeed import DeepSpeed

FP32 = 4
ADAM = 2  # DeepSpeedCPUAdam's exp_avg and exp_avg_sq: fp32, pageable (torch.zeros_like)


class Host(NamedTuple):
    """Bytes of one rank; a node needs as much for each of its ranks."""

    pinned: int = 0
    """Page-locked: as torch's allocator hands it out, rounded up to a power of two; and NVMe's
    buffers, which are locked as they are."""
    pageable: int = 0
    nvme: int = 0
    loading: int = 0
    """The weights while from_pretrained runs, in every rank: files mapped from safetensors, which
    the ranks of a node share, unless they are converted to another dtype."""


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
        loading = 0 if quantized else sum(w.nbytes for w in weights if _is_loaded(w))
        locked, loose = _stages_1_and_2(zero, flat, width)
        if locked and accumulation > 1 and zero.stage == 2:  # async_accumulate_grad_in_cpu_via_gpu
            locked += owned
        return Host(*_pinned(zero, [(n, False) for n in locked], 0, loose), 0, loading)
    wanted, loose, files, buffers = _stage_3(zero, weights, ranks, width)
    quantized = any(w.role == PACKED for w in weights)
    loading = 0 if quantized else sum(w.nbytes for w in weights if _is_loaded(w))
    return Host(*_pinned(zero, wanted, buffers, loose), files, loading)


def _is_loaded(w: Weight) -> bool:
    return w.role != "adapter" and not w.packed


def _stage_3(
    zero: DeepSpeed, weights: Sequence[Weight], ranks: int, width: int
) -> tuple[list[tuple[int, bool]], int, int, int]:
    """(bytes, whether of weights) of what is to be pinned; pageable; on NVMe; NVMe's buffers."""
    groups = sub_groups(weights, ranks, zero.sub_group_size)
    locked: list[tuple[int, bool]] = []
    loose = files = buffers = 0
    if zero.offload_optimizer is not None:
        locked.append((sum(groups) * width, False))  # grad_partitions_flat_buffer
    if zero.offload_optimizer == "cpu":
        locked += [(n * FP32, False) for n in groups]  # the gradients in fp32
        loose += sum(groups) * FP32 * (1 + ADAM)  # masters and states
    if zero.offload_optimizer == "nvme":
        files += sum(groups) * FP32 * (2 + ADAM)  # masters, gradients and states
        buffers += max(groups) * FP32 * zero.optimizer_buffer_count
    if zero.offload_param is None:
        return locked, loose, files, buffers
    # zero.Init pins each partition; trained ones are then copied to a flat buffer, and what was
    # pinned stays with torch's allocator. A tied head is made before it is tied.
    made = [w for w in weights if not w.packed]
    made += [w for w in made if w.role == "embedding"][: not any(w.role == "head" for w in made)]
    each = [partition(w.numel, ranks) * w.itemsize for w in made]
    if zero.offload_param == "cpu":
        locked += [(n, True) for n in (sum(groups) * width, *each)]
        return locked, loose, files, buffers
    near = min(sum(groups), zero.max_in_cpu)
    locked.append((near * width, True))
    locked.append((zero.param_buffer_count * zero.param_buffer_size * width, True))
    for n in groups:  # a group that has no room in the flat buffer is on NVMe whole
        files += 0 if n <= near else n * width
        near -= n if n <= near else 0
    files += sum(n for w, n in zip(made, each, strict=True) if not w.trains)
    return locked, loose, files, buffers


def _pinned(
    zero: DeepSpeed, wanted: Iterable[tuple[int, bool]], buffers: int, loose: int
) -> tuple[int, int]:
    """Pinned and pageable bytes: offload_optimizer and offload_param have a pin_memory each."""
    of_weights = zero.pin_memory if zero.pin_param_memory is None else zero.pin_param_memory
    locked = buffers
    for nbytes, is_weight in wanted:
        if of_weights if is_weight else zero.pin_memory:
            locked += pinned(nbytes)
        else:
            loose += nbytes
    return locked, loose


def _stages_1_and_2(zero: DeepSpeed, flat: Flat, width: int) -> tuple[list[int], int]:
    if zero.offload_optimizer is None:
        return [], 0
    # masters, weights on their way back, gradients in fp32, the largest gradient
    locked = [flat.part * FP32, flat.part * width, flat.part * FP32, flat.largest * width]
    return locked, flat.part * FP32 * ADAM
