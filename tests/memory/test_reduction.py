"""The buffer of a sum over tokens: by hand, and against the tracer's transcription."""

from __future__ import annotations

import pytest

from vramplan.memory.reduction import Processors, buffer_bytes


def test_by_hand() -> None:
    # 1024 outputs in vectors of 4: blocks of 32 x 4 threads, 8 blocks across; 132 x 16 wanted.
    # 4096 rows: 1024 values a thread, 1024 / 16 = 64 shares (of at most 2112 / 8 = 264)
    assert buffer_bytes(1024, 4096) == 4 * 1024 * 64 * 32 * 4
    assert buffer_bytes(1024, 1 << 15) == 4 * 1024 * 264 * 32 * 4  # the device is full: 132 MiB
    assert buffer_bytes(1024, 1020) == 0  # 255 values a thread: one block does it


@pytest.mark.parametrize("outputs", [1000, 1024, 2304, 4544, 16384, 50257])
@pytest.mark.parametrize("rows", [100, 1024, 4096, 100_000])
def test_as_the_tracer_has_it(outputs: int, rows: int) -> None:
    torch = pytest.importorskip("torch")
    tracing = pytest.importorskip("vramplan_launcher.trace.reduction")
    tensor = torch.empty(rows, outputs, dtype=torch.bfloat16, device="meta")
    for count, threads in ((132, 2048), (108, 2048), (128, 1536)):
        device = tracing.Processors(count=count, threads=threads)
        found = buffer_bytes(outputs, rows, Processors(multiprocessors=count, threads=threads))
        assert found == tracing.buffer_bytes(tensor, [0], device)
