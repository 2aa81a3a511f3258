"""The buffer of a sum over tokens on CUDA: bias gradients, whatever was broadcast over tokens.

When several thread blocks share an output they meet in a buffer that is many times the output: it
grows with the rows up to a bound that is the device's own (132 MiB on an H100), whatever the width.
Source: setReduceConfig, ReduceConfig::global_memory_size (aten/src/ATen/native/cuda/Reduce.cuh,
torch 2.13) for rows of contiguous outputs, sums in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

REDUCTION = -1  # in a storage's size: (outputs, rows a token, REDUCTION), not bytes and exponents

MAX_THREADS = 512
WARP = 32
MIN_VALUES, MAX_VALUES = 16, 256  # values a thread sums: from when on blocks share, and the most
ACCUMULATOR = 4  # bytes


class Processors(NamedTuple):
    """A device's multiprocessors, and the threads that each holds (NVIDIA H100's, H200's)."""

    multiprocessors: int = 132
    threads: int = 2048


HOPPER = Processors()


def buffer_bytes(outputs: int, rows: int, device: Processors = HOPPER) -> int:
    """Bytes of the buffer for summing `rows` x `outputs` numbers over the rows; 0: none needed."""
    vector = next(v for v in (4, 2, 1) if outputs % v == 0)
    limit = MAX_THREADS // vector
    across = min(_power_of_two(outputs // vector), limit)
    height = min(_power_of_two(rows), limit, limit // min(across, WARP))
    width = min(across, limit // height)
    values = -(-rows // height)
    blocks = -(-outputs // vector // width)
    target = device.multiprocessors * (device.threads // (width * height))
    if values < MAX_VALUES or rows < 16 * height or blocks > target:
        return 0
    shares = max(min(-(-target // blocks), -(-values // MIN_VALUES)), -(-values // MAX_VALUES))
    return ACCUMULATOR * outputs * shares * width * vector if shares > 1 else 0


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (max(n, 1).bit_length() - 1)
