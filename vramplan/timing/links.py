"""What moves between cards, and between a card and its host, in a step.

Sources: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (reduce_ipg_grads, step,
async_inplace_copy_grad_to_fp32_buffer_from_gpu, unscale_and_clip_grads) and stage3.py; torch 2.11,
nn/parallel/distributed.py (DDP's buckets are reduced while backward runs). A ring moves (n - 1) / n
of the bytes for a gather or a scatter, twice that for both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from vramplan.hardware.gpu import Gpu, Gpus
from vramplan.memory.precision import Policy
from vramplan.memory.values import ITEMSIZE
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import inventory
from vramplan.recipe.recipe import Recipe
from vramplan.timing.rates import PAGEABLE, rates_of
from vramplan.timing.stepping import Step

LINK = 0.80
"""Of a link's bandwidth: all-reduce of 1 GiB on 8 H100 ran at 361 GB/s of bus bandwidth, of 450
(NCCL without multicast, 2026-11-13)."""
PCIE_SHARE = 0.87
"""Of a PCIe link's bandwidth: 55.4 GB/s of 63.0 with page-locked memory, either way (an H200)."""
PCIE = {"hopper": 63e9, "blackwell": 63e9}
OTHER_PCIE = 31.5e9
"""PCIe 4.0 x16."""
BETWEEN_NODES = 25e9
"""Bytes a second and card between machines: a 200 Gbit/s adapter each; taken where a card names no
link of its own, and for more ranks than a machine holds."""
NODE = 8
HIDDEN = 0.8
"""Of the time of backward (in stage 3 of forward as well), how much can hide communication."""
HOST_ADAM = 4.2e9
"""Parameters a second of DeepSpeedCPUAdam: 201e6 in 47 ms (16 cores of an Intel Xeon, AVX-512)."""
HOST_STREAM = 1.0e11
"""Bytes a second that a host's memory moves (a copy, counted both ways)."""
MASTER = 4


class Exchange(NamedTuple):
    """Seconds of a step; the names are those of StepTime.parts."""

    communication: float
    """What does not hide behind backward."""
    offload: float
    optimizer: float


def pcie(gpu: Gpu) -> float:
    """Bytes a second between a card and page-locked host memory, one way."""
    if gpu.link.startswith("PCIe") and gpu.link_bandwidth:
        return PCIE_SHARE * gpu.link_bandwidth
    return PCIE_SHARE * PCIE.get(gpu.arch, OTHER_PCIE)


def paging_seconds(nbytes: int, gpu: Gpu) -> float:
    """A step of a paged optimizer for whose states the card has no room: so many bytes are read
    from the host and written back. Managed memory migrates at about the pace of pageable copies."""
    return 2 * nbytes / min(PAGEABLE, pcie(gpu))


def link(gpus: Gpus, ranks: int, network: float = BETWEEN_NODES) -> float:
    """Bytes a second that a rank sends in a ring; `network`: each card's between machines."""
    inside = gpus.gpu.link_bandwidth or network
    return LINK * (min(network, inside) if ranks > NODE else inside)


@lru_cache(maxsize=256)
def _weight_bytes(arch: Architecture, width: int) -> int:
    return sum(t.numel * t.count * width for t in inventory(arch) if t.role != "buffer")


def exchange(
    arch: Architecture,
    policy: Policy,
    recipe: Recipe,
    gpus: Gpus,
    step: Step,
    cover: tuple[float, float],
    network: float = BETWEEN_NODES,
) -> Exchange:
    """What ranks and hosts add to a step, and what its update takes then.

    `cover`: seconds of forward and of backward, behind which communication can hide.
    """
    zero, ranks, steps = recipe.deepspeed, recipe.world_size, recipe.gradient_accumulation_steps
    stage = 0 if zero is None else zero.stage
    pace, share = link(gpus, ranks, network), (ranks - 1) / ranks
    whole = _weight_bytes(arch, ITEMSIZE[policy.weight_dtype])
    hidden = after = 0.0
    forward, backward = cover
    if stage < 2:  # once a step, behind the last micro-batch's backward
        hidden, backward = 2 * share * step.gradients / pace, backward / steps
    else:
        hidden = steps * share * step.gradients / pace
    if stage in (1, 2):
        after = share * step.gradients / pace
    if stage == 3:  # gathered for forward, and again for backward
        hidden += 2 * steps * share * whole / pace
        backward += forward
    communication = after + max(0.0, hidden - HIDDEN * backward)
    if zero is None or stage == 0:
        return Exchange(communication, 0.0, step.card)
    part, rates = step.elements / ranks, rates_of(gpus.gpu)
    width = ITEMSIZE[policy.weight_dtype]
    offload = 0.0
    # masters and both states are read and written, gradients read, weights written
    optimizer = part * (6 * MASTER + 2 * width) / rates.several[MASTER]
    if zero.offload_optimizer is not None:
        near = min(ranks, NODE)  # ranks that share a host's cores and memory
        optimizer = part * near / HOST_ADAM
        # gradients in fp32 come while backward runs, weights go back when the step is done
        offload = max(0.0, steps * part * MASTER / pcie(gpus.gpu) - HIDDEN * cover[1])
        offload += part * width / pcie(gpus.gpu)
        offload += part * near * (2 * MASTER + MASTER + width) / HOST_STREAM  # scaled; cast
    if zero.offload_param is not None:
        offload += 2 * steps * whole / ranks / pcie(gpus.gpu)
    return Exchange(communication, offload, optimizer)
