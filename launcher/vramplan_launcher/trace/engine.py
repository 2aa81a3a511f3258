"""How autograd's engine adds two gradients that meet: in place, where a run on a GPU does so.

The engine adds the second gradient into the first when nobody else holds the first one, neither
the tensor nor its storage (input_buffer.cpp, `accumulate`, `can_accumulate_inplace`, torch
2.11-2.13; a view holds its base, so it never qualifies). It never does with tensor subclasses or
under a dispatch mode, so on fake tensors every sum is a tensor of its own. Here the sum that the
engine asks for is told from others by its caller, and answered with the first gradient. A test
compares with what torch.profiler sees on real tensors (`aten::add_` and `aten::add`).
"""

from __future__ import annotations

import functools
import sys
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WRAPPERS = ("torch._compile", "torch._dynamo", "torch.utils._python_dispatch", __package__)
"""Modules whose frames lie between a dispatch mode and whoever called the operation."""


def called_by_engine() -> bool:
    """Whether no Python code is between the engine and the operation that is dispatched.

    That leaves the engine's own sums and what C++ formulas call; none of those that decoders use
    adds two tensors (derivatives.yaml, FunctionsManual.cpp).
    """
    if torch.is_grad_enabled():  # a checkpoint's recomputation
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(WRAPPERS):
        frame = frame.f_back  # type: ignore[assignment]
    # A CUDA device has a thread of the engine's own, with no Python below.
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


def holders(tensor: torch.Tensor) -> tuple[int, int]:
    """Counted references to a tensor and to its storage, those of this call among them."""
    storage, counted = tensor.untyped_storage(), cast(Any, tensor)
    return counted._use_count(), torch._C._storage_Use_Count(storage._cdata)


class _Probe(TorchDispatchMode):
    """Counts the holders of the first gradient of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is aten.add.Tensor and called_by_engine():
            self.found.append(holders(args[0]))
        return func(*args, **(kwargs or {}))


@functools.cache
def sole_holders() -> tuple[int, int]:
    """What `holders` says of a gradient that the engine alone holds, as it is tried here."""
    with torch.enable_grad(), FakeTensorMode(), _Probe() as probe:
        x = torch.empty(8, requires_grad=True)
        y = x * 1.0
        (y * 2.0 + y * 3.0).sum().backward()
    return probe.found[0]


def dense(tensor: torch.Tensor) -> bool:
    """`is_non_overlapping_and_dense`: every element in one place, and no gaps."""
    expected = 1
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    for size, stride in sorted((p for p in sizes if p[0] != 1), key=lambda p: p[1]):
        if stride != expected:
            return False
        expected *= size
    return True


def adds_in_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this `aten.add.Tensor` is the engine's, and goes into its first operand."""
    if len(args) != 2 or kwargs or not called_by_engine():
        return False
    first, second = args
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    return (
        not first._is_view()
        and first.dtype == second.dtype
        and first.shape == second.shape
        and dense(first)
        and all(a <= b for a, b in zip(holders(first), sole_holders(), strict=True))
    )
