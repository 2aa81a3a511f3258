"""The tape of a step under ZeRO: hooks take each gradient away as soon as it is there.

Sources: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (setup_buckets,
reduce_independent_p_g_buckets_and_remove_grads, reduce_ipg_grads), runtime/zero/stage3.py
(__add_grad_to_ipg_bucket, __reduce_and_partition_ipg_grads), runtime/zero/linear.py
(LinearFunctionForZeroStage3), runtime/comm/coalesced_collectives.py (reduce_scatter_coalesced).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from vramplan.memory.kinds import record_kinds
from vramplan.memory.precision import Policy
from vramplan.memory.program import Program, reduce_recording
from vramplan.memory.record import Recorder
from vramplan.memory.values import Parameter, Size, Value
from vramplan.models.architecture import Architecture

EPILOGUE = "epilogue"
"""The section in which stage 1 lets go of all gradients that another rank owns."""


class Hooks(NamedTuple):
    """What of ZeRO's settings shapes the tape."""

    stage: int
    bucket: int
    """reduce_bucket_size: elements."""
    overlap: bool
    contiguous: bool
    offload: bool
    """The gradients' partition is on the host."""
    several: bool
    """More than one rank."""
    scattered: bool = False
    """Stages 1 and 2: a bucket is longer than a partition, so it always has several owners."""
    efficient_linear: bool = True
    """memory_efficient_linear: stage 3 replaces torch.nn.functional.linear."""


class ZeroRecorder(Recorder):
    """A recorder whose gradients go to buckets, as the hooks on AccumulateGrad take them."""

    def __init__(self, policy: Policy, hooks: Hooks) -> None:
        super().__init__(policy)
        self.hooks = hooks
        self.buckets: list[Value] = []
        self.pending: list[Value] = []  # gradients that wait for their reduction, uncopied
        self.reduced: list[Value] = []  # uncopied ones that the next reduction lets go
        self.kept: list[Value] = []  # stage 1's oversized ones, until all are reduced
        self.elements = self.waiting = 0
        self.addmm = False

    def leaf(self, parameter: Parameter) -> Value:
        value = super().leaf(parameter)
        if parameter.node is not None:
            parameter.node.backward = self._hooked(parameter)
        return value

    def backward(self, loss: Value) -> None:
        super().backward(loss)
        self._reduce()
        if self.hooks.stage == 1:
            self.mark("backward", EPILOGUE, gathers=True)
        self.reduced.clear()
        self.kept.clear()
        self.buckets.clear()

    def loss(self, logits: Value, vocabulary: int) -> Value:
        """Stage 3 lets go of the head's weight before."""
        if self.hooks.stage == 3:
            self.mark("forward", "loss")
        return super().loss(logits, vocabulary)

    def state(self) -> tuple[int, ...]:
        """What waits for its reduction, and what the last one has not let go."""
        waiting = [len(self.reduced), len(self.buckets), *(g.size.numel for g in self.pending)]
        return self.elements, self.waiting, *waiting

    def _hooked(self, parameter: Parameter) -> Callable[..., Any]:
        """AccumulateGrad and the hook behind it: `grad` itself lives until both are through."""

        def backward(grad: Value) -> tuple[()]:
            parameter.node = None
            if grad.storage is not None:
                self.categories[grad.storage.index] = "gradient"
            self._ready(parameter, grad)
            return ()

        return backward

    def _ready(self, parameter: Parameter, grad: Value) -> None:
        hooks, count = self.hooks, parameter.size.numel
        if hooks.stage < 3 and hooks.contiguous and not self.buckets:
            self._make_buckets(grad.dtype)
        if self.elements + count > hooks.bucket and self.elements:
            self._reduce()
        if not hooks.contiguous or self.elements + count > hooks.bucket:
            if hooks.stage < 3 and hooks.offload and hooks.contiguous:
                grad = self.new(grad.size, grad.dtype, "gradient")  # an oversized one is cloned
            self.pending.append(grad)
            if hooks.stage == 1:
                self.kept.append(grad)
        self.elements += count
        self.waiting += 1

    def _make_buckets(self, dtype: str) -> None:
        count = 2 if self.hooks.overlap else 1
        self.buckets = [self.new(Size(self.hooks.bucket), dtype, "buffer") for _ in range(count)]

    def _reduce(self) -> None:
        """Several gradients, or a bucket's slices of several owners, are put into a new tensor.

        reduce_scatter_coalesced; allreduce_and_scatter and buffered_reduce_fallback (flatten).
        """
        hooks = self.hooks
        self.reduced.clear()
        flattened = hooks.several or not hooks.contiguous
        if hooks.stage < 3 and hooks.contiguous:
            flattened = hooks.scattered
        alone = hooks.scattered and self.waiting == 1  # slices, until they fill a bucket
        if (flattened and self.waiting > 1) or alone:
            count = min(self.elements, 2 * hooks.bucket) if alone else self.elements
            together = self.new(Size(count), self.policy.weight_dtype, "buffer")
            del together
        if hooks.stage < 3 and hooks.overlap and not hooks.contiguous:
            self.reduced = self.pending[:]
        self.pending.clear()
        self.elements = self.waiting = 0

    # -- stage 3 replaces torch.nn.functional.linear -------------------------------------------
    def linear(self, x: Value, name: str, n_in: int, n_out: int, *rest: Any, **named: Any) -> Value:
        self.addmm = bool(named.get("transposed"))  # Conv1D calls addmm: not replaced
        out = super().linear(x, name, n_in, n_out, *rest, **named)
        self.addmm = False
        return out

    def dense(self, x: Value, weight: Value, bias: Value | None, n_in: int, n_out: int) -> Value:
        """LinearFunctionForZeroStage3 saves its input and weight whatever needs a gradient."""
        if self.hooks.stage < 3 or self.addmm or not self.hooks.efficient_linear:
            return super().dense(x, weight, bias, n_in, n_out)
        inputs = (x, weight) if bias is None else (x, weight, bias)
        sizes = [(v.size, v.requires_grad) for v in inputs]
        size, dtype = x.size.per(n_in).times(n_out), x.dtype

        def backward(grad: Value) -> tuple[Value | None, ...]:
            grads = [self.new(s, dtype) if needed else None for s, needed in sizes[:2]]
            if bias is not None:
                grads.append(self.sum_to(grad, sizes[2][0]) if sizes[2][1] else None)
            return tuple(grads)

        return self.record(inputs, lambda: inputs, lambda: self.new(size, dtype), backward)


@lru_cache(maxsize=1024)
def compile_zero(arch: Architecture, policy: Policy, hooks: Hooks) -> Program:
    """Record one micro-batch of `arch` with ZeRO's hooks, and reduce it."""
    return reduce_recording(record_kinds(lambda: ZeroRecorder(policy, hooks), arch))
