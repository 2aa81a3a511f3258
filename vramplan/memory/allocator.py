"""What the caching allocator and the process add to the bytes that tensors ask for.

Sources: c10/cuda/CUDACachingAllocator.cpp and aten/src/ATen/cuda/CUDABlas.cpp (torch 2.11-2.13);
measurements named beside each constant.
"""

from __future__ import annotations

from vramplan.units import MIB

BLOCK = 512
"""kMinBlockSize: every allocation is a multiple of it."""
SEGMENT = 2 * MIB
"""kRoundLarge: segments of more than 10 MiB are multiples of it."""
LARGE = 10 * MIB
"""kMinLargeAlloc: from here a segment is made for the allocation alone."""
UNSPLIT = MIB
"""kSmallSize: a rest up to this size stays with its block (default allocator only)."""

WORKSPACE_HOPPER = 32 * MIB
WORKSPACE = 2 * 4096 * 1024 + 8 * 16 * 1024
"""getChosenWorkspaceSize: per handle and stream, 4096 KiB x 2 + 16 KiB x 8; 32 MiB on sm_90."""
WORKSPACES = 2
"""The forward thread and autograd's device thread have a handle each."""

CONTEXT = 760 * MIB
"""CUDA context, kernels and libraries of a training process: NVML's figure less what torch had
reserved, NVIDIA H100 and H200 with driver 580 and torch 2.11: 742-760 MiB in 206 runs."""
CONTEXT_INT8 = 822 * MIB
"""The same with bitsandbytes' int8 kernels and its own cuBLASLt context: 822 MiB."""

SIDE_STREAM = 72 * MIB
"""What a stream of DeepSpeed's own to reduce on adds: 828 MiB in 77 runs with a pretended group,
894 with int8, where 5 of stage 0 and one of stage 3 without overlap_comm had 758. NVIDIA H100."""
NCCL_DDP = 852 * MIB
NCCL_ALONE = (954 * MIB, 884 * MIB, 884 * MIB, 494 * MIB)
"""The same of DeepSpeed's engine on one GPU: its communicators are made, if of one rank; 7 runs."""
NCCL_ENGINE = (1338 * MIB, 1268 * MIB, 1268 * MIB, 980 * MIB)
"""NCCL's own memory, by who uses it; DeepSpeed's by stage. NVML's figure of runs on two NVIDIA H100
through NVLink (NCCL 2.28.9, 24 channels, no NVLS), less that of the same run with a pretended
group: the same in every one of 6 and 14 runs, and in three with stages 2 and 3 on four H100. DDP
has one communicator; DeepSpeed two, the world's and a clone of it for data parallelism. Of a
communicator 372 MiB are the first one's, 198 each further one's; 474 and 288 come with its first
collective."""

WORKSPACE_LT = MIB
"""_getWorkspaceSize: cuBLASLt's, 1024 KiB for each thread that adds a bias in a product."""

SLACK_PERCENT = {"expandable_segments": 3, "default": 20}
FRAGMENTS = 128 * MIB
"""What the allocator needs beyond the peak, measured by capping it. Expandable segments: nine runs
of 5 to 24 GiB ended at 1.03 x their peak; of 49 runs of 1 to 20 GiB five still failed at that and
one granule of 20 MiB, and 48 ended with 128 MiB beside the 3 %. What can't be given back are
granules (kLargeBuffer) that are partly in use, so their number counts more than the peak. The
default allocator: one of the nine failed at 1.12 x and ended at 1.20 x."""


def rounded(nbytes: int, allocator: str = "expandable_segments") -> int:
    """Bytes that torch's counters show for an allocation of `nbytes`."""
    blocks = -(-nbytes // BLOCK) * BLOCK
    if allocator == "default" and blocks >= LARGE:
        segment = -(-blocks // SEGMENT) * SEGMENT
        if segment - blocks <= UNSPLIT:
            return segment
    return blocks


def workspaces(compute_capability: str | None, epilogues: int = 0) -> int:
    """cuBLAS workspaces that stay allocated after the first step; `epilogues` have cuBLASLt's."""
    hopper = compute_capability is None or compute_capability == "9.0"
    return WORKSPACES * (WORKSPACE_HOPPER if hopper else WORKSPACE) + epilogues * WORKSPACE_LT


def slack(peak: int, allocator: str, largest: int = 0) -> int:
    """Bytes that the allocator needs beyond `peak_allocated` for the run to end.

    `largest`: the largest temporary of a step that goes parameter by parameter (Adafactor). It
    finds no hole that the last one left: the 49th of those runs ended with that much more.
    """
    return peak * SLACK_PERCENT[allocator] // 100 + FRAGMENTS + largest


def context(quantization: str | None, reduces: bool = False) -> int:
    """Bytes outside torch's counters: the CUDA context and what is loaded into it.

    `reduces`: DeepSpeed has a stream to reduce on (stages 1 and 2; stage 3 with overlap_comm).
    """
    alone = CONTEXT_INT8 if quantization == "int8" else CONTEXT
    return alone + (SIDE_STREAM if reduces else 0)


def nccl(ranks: int, stage: int | None) -> int:
    """Bytes of NCCL's communicators on a rank; `stage`: ZeRO's, None for DDP, or for one GPU."""
    if stage is None:
        return NCCL_DDP if ranks > 1 else 0
    return (NCCL_ENGINE if ranks > 1 else NCCL_ALONE)[stage]
