"""Stages 1 and 2: whole weights, a flat partition of masters and states, gradients on their way.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (__init__, initialize_optimizer_states,
process_gradients, setup_buckets, reduce_independent_p_g_buckets_and_remove_grads, reduce_ipg_grads,
copy_grads_in_partition, reduce_gradients, independent_gradient_partition_epilogue, step).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from vramplan.memory.optimizer_states import FP32
from vramplan.memory.program import compile_step
from vramplan.memory.ranks import Weight
from vramplan.memory.zero_extras import extras_of
from vramplan.memory.zero_part import NORM, Part, Run, Sharded, nothing
from vramplan.memory.zero_tape import EPILOGUE


def stage_1_and_2(part: Part) -> Sharded:
    flat, width = part.flat, part.width
    frozen = part.each(part.frozen())
    whole = part.up(flat.total * width)
    weights = frozen + whole
    fp32 = part.up(flat.part * FP32)
    arriving = 0 if part.offload else part.up(flat.owned * width)
    masters = 0 if part.offload else fp32
    loaded, load_peak, prepared = part.loading()
    peak = max(
        part.each(part.list) + whole,
        weights + part.up(flat.part * width) + (masters if width != FP32 else 0),
        weights + 2 * masters,
    )
    last, others = _Arrivals(part, arriving).runs()
    return Sharded(
        rank=part.rank,
        weights=weights,
        masters=masters,
        states=0 if part.offload else part.states_of(flat.part),
        buffers=part.up(flat.largest * width) if part.offload else 0,
        gradients=0,
        loaded=loaded,
        load_peak=load_peak,
        initialized=weights + masters + (part.up(flat.largest * width) if part.offload else 0),
        initialized_peak=max(peak, prepared),
        arriving=arriving,
        step=0 if part.offload else _step(part, arriving),
        host=part.host(),
        flat=flat,
        last=last,
        others=others,
    )


def _step(part: Part, arriving: int) -> int:
    """A norm in fp64; what is owned, flattened, and in fp32; what the optimizer itself needs.

    While the first of two groups is stepped, views of the second keep the buffer that both share.
    """
    shared = arriving if len(part.groups) > 1 else 0
    flat, fp32 = part.flat, part.up(part.flat.part * FP32)
    gradient = part.up(flat.part * part.width)  # flattened: a copy
    return max(
        arriving + part.up(flat.largest_owned * NORM),
        arriving + gradient + (fp32 if part.width != FP32 else 0),
        shared + fp32 + part.stepping(flat.part),
    )


class _Arrivals:
    """Where gradients are while backward runs. A gradient larger than a bucket is oversized: it is
    never copied to one, and waits for the next gradient."""

    def __init__(self, part: Part, arriving: int) -> None:
        self.part, self.arriving = part, arriving
        self.bucket = part.sizes["reduce_bucket"]
        self.contiguous = part.zero.contiguous_gradients or part.offload
        self.layers = part.arch.layers
        self.owned = part.owned
        self.all = part.each(part.trained)
        inner = [(w, n) for w, n in self.owned if w.layer >= 0]
        # stage 1's tape keeps oversized gradients to its end: but not those that are owned
        over = [w for w, n in inner if n and self._is_oversized(w)]
        self.gone = self._from(over if part.zero.stage == 1 else ())
        self.moved = self._from(w for w, n in inner if n or not self._is_oversized(w))
        self.norms = self._norms() if part.offload else (0, 0, 0)
        one = part.up(self.bucket * part.width)
        self.buckets = one * (2 if part.zero.overlap_comm else 1) if self.contiguous else 0
        self.flattened = 0 if self.contiguous else one

    def runs(self) -> tuple[Run, tuple[Run, ...]]:
        """The last micro-batch, and others."""
        part, several = self.part, self.part.accumulation > 1
        if part.zero.stage == 2 or (part.zero.overlap_comm and self.contiguous and not several):
            program = part.hooked()
            extras = extras_of(program, self.within, self.after)
            return Run(program, extras, self.arriving if several else 0), ()
        plain = compile_step(part.arch, part.policy)
        left = extras_of(plain, self.left_within, self.left_after)
        if not several:
            return Run(plain, left), ()
        program = compile_step(part.arch, replace(part.policy, accumulating=True))
        early = extras_of(plain, self.left_within, nothing)
        if not part.zero.overlap_comm or not self.contiguous:
            extras = extras_of(program, nothing, self.later_after)
        else:
            extras = extras_of(program, self.moved_within, self.moved_after)
        held = self.all + self.buckets
        others = [Run(plain, early)]
        if part.accumulation > 2:
            others.append(Run(program, extras_of(program, nothing, nothing), held))
        return Run(program, extras, held), tuple(others)

    # -- reduced as they come -------------------------------------------------------------------
    def within(self, phase: str, place: int | str) -> int:
        """The buffer for owned gradients; to it go what the tape of stage 1 keeps of them."""
        if phase != "backward":
            return 0
        if place == EPILOGUE:
            return self.arriving - self.gone[0]
        if place == "inputs":
            place = -1
        if not isinstance(place, int):
            return 0
        owned = self.arriving if place < self.part.flat.until else 0
        return owned - self.gone[place + 1]

    def after(self, phase: str, place: int | str) -> int:
        if phase != "backward":
            return 0
        until = self.part.flat.until
        if place == "head":
            if until < self.layers:
                return self.norms[2]
            last = 0 if self.part.zero.stage == 1 else self._waiting(self.layers)
            return max(self.arriving + last, self.norms[2])
        if isinstance(place, int):
            owned = self.arriving if place <= until else 0
            return owned - self.gone[place] + (self.norms[1] if place <= until else 0)
        if place == "inputs" and self.part.zero.stage == 1:
            owned = self.arriving if until >= 0 else 0
            return max(owned, self.norms[0]) - self.gone[0]
        if place == "inputs":
            return max(self._waiting(-1) + self.arriving + self.buckets, self.norms[0])
        return self.arriving if place == EPILOGUE else 0

    def _waiting(self, layer: int) -> int:
        """An oversized gradient that comes last of a layer waits for the next, or for the end."""
        mine = [w for w in self.part.trained if w.layer == layer and self._is_oversized(w)]
        return max((self.part.up(w.nbytes) for w in mine), default=0)

    def _is_oversized(self, w: Weight) -> bool:
        return w.numel > self.bucket

    def _norms(self) -> tuple[int, int, int]:
        """set_norm_for_param_grad_in_gpu: the largest owned gradient and its copy in fp64, of those
        before the layers, in them, and behind them."""
        most = [0, 0, 0]
        for w, owned in self.owned:
            place = 0 if w.layer < 0 else 1 if w.layer < self.layers else 2
            if owned:
                up = self.part.up
                most[place] = max(most[place], up(w.nbytes) + up(owned * NORM))
        return most[0], most[1], most[2]

    # -- stage 1, reduced after backward --------------------------------------------------------
    def left_within(self, phase: str, place: int | str) -> int:
        """The first gradient makes the buckets; reducing uncopied ones flattens them."""
        inner = phase == "backward" and (isinstance(place, int) or place == "inputs")
        return self.buckets + (self.flattened if self.part.zero.overlap_comm else 0) if inner else 0

    def left_after(self, phase: str, place: int | str) -> int:
        """Beyond all gradients and what was there before the layers."""
        if phase != "backward" or place != "inputs":
            return 0
        return self.buckets + self.later_after(phase, place)

    def later_after(self, phase: str, place: int | str) -> int:
        if phase != "backward" or place != "inputs":
            return 0
        if not self.contiguous:
            return self.flattened
        live = most = elements = 0
        waiting: list[tuple[Weight, int]] = []
        come = False
        for w, owned in [*self.owned, (None, 0)]:
            if w is None or elements + w.numel > self.bucket:
                for old, mine in waiting:
                    if mine and not come:
                        come, live = True, live + self.arriving
                        most = max(most, live)
                    if mine and self._is_oversized(old):
                        live -= self.part.up(old.nbytes)
                waiting, elements = [], 0
            if w is not None:
                waiting.append((w, owned))
                elements += w.numel
                if not self._is_oversized(w):
                    live -= self.part.up(w.nbytes)
        return most

    # -- stage 1, reduced in the last backward of several ---------------------------------------
    def moved_within(self, phase: str, place: int | str) -> int:
        """Gradients of all micro-batches go as they are reduced."""
        if place == "inputs":
            place = -1
        if phase != "backward" or not isinstance(place, int):
            return 0
        owned = self.arriving if place < self.part.flat.until else 0
        return owned - self._moved(place + 1)

    def moved_after(self, phase: str, place: int | str) -> int:
        if phase != "backward" or not (isinstance(place, int) or place == "inputs"):
            return 0
        layer = -1 if place == "inputs" else int(place)
        owned = self.arriving if layer <= self.part.flat.until else 0
        return owned - self._moved(max(layer, 0))

    def _moved(self, layer: int) -> int:
        return self.moved[layer]

    def _from(self, found: Iterable[Weight]) -> list[int]:
        """Bytes of these weights from each layer on; the last entry is for behind the head."""
        out = [0] * (self.layers + 2)
        for w in found:
            out[max(w.layer, 0)] += self.part.up(w.nbytes)
        for layer in reversed(range(self.layers + 1)):
            out[layer] += out[layer + 1]
        return out
