"""From counted work to seconds: a clock for the card and one for the host that feeds it.

A stretch's kernels run one after the other on the card; the host's thread launches them ahead. Over
a stretch of even work the card is done when its own work is, or when the host's is, whichever comes
later.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from operator import mul
from typing import NamedTuple

from vramplan.hardware.gpu import Gpu
from vramplan.memory.precision import Policy
from vramplan.memory.program import MONOMIALS, powers_of
from vramplan.models.architecture import Architecture
from vramplan.timing.kernels import Seconds, seconds_of
from vramplan.timing.rates import HOST, HOST_EXPERT, Rates, rates_of
from vramplan.timing.work import Kernel, Stretch, count_work

PARTS = ("forward", "recompute", "backward", "dequantize")
SYNCHRONIZES = ("int8",)
"""Kinds whose host waits for the card (int8 asks how many outliers there are), so that the card
then waits for the host."""


class Beat(NamedTuple):
    """A stretch, ready to be evaluated."""

    repeats: int
    host: float
    """Seconds of launching."""
    stall: float
    """Seconds that the card waits whatever the host is ahead."""
    parts: tuple[tuple[int, tuple[float, ...], tuple[tuple[int, int], ...]], ...]
    """Part, polynomial of its pointwise seconds, and (kernel, how many) of the others."""


class Spent(NamedTuple):
    """Seconds of a micro-batch."""

    total: float
    parts: tuple[float, ...]
    """The card's, by PARTS; what is missing to the total is waiting for the host."""


class Clock(NamedTuple):
    """A step's work on one card."""

    beats: tuple[Beat, ...]
    kernels: tuple[Seconds, ...]

    def run(self, batch: int, seq: int) -> Spent:
        """A micro-batch, forward and backward."""
        powers = powers_of(batch, seq)
        times = [seconds(powers) for seconds in self.kernels]
        host = card = 0.0
        totals = [0.0] * len(PARTS)
        for repeats, launching, stall, parts in self.beats:
            working = stall
            for part, polynomial, kernels in parts:
                took = sum(map(mul, polynomial, powers))
                for k, n in kernels:
                    took += n * times[k]
                totals[part] += repeats * took
                working += took
            host += repeats * launching
            card = max(card + repeats * working, host)
        return Spent(card, tuple(totals))


@lru_cache(maxsize=4096)
def micro_batch(arch: Architecture, policy: Policy, gpu: Gpu, batch: int, seq: int) -> Spent:
    """Seconds of a micro-batch of `batch` x `seq` tokens, without Trainer's own."""
    return clock_of(arch, _essential(policy), gpu).run(batch, seq)


def _essential(policy: Policy) -> Policy:
    """What barely moves time is left out, so that few programs are compiled."""
    return replace(policy, single_sequence=False, accumulating=False, double_quant=True)


@lru_cache(maxsize=1024)
def clock_of(arch: Architecture, policy: Policy, gpu: Gpu) -> Clock:
    """Compiled once for a model, a policy and a card."""
    rates = rates_of(gpu, policy.attention == "flash_attention_2")
    index: dict[Kernel, int] = {}
    beats = tuple(_beat(s, rates, index) for s in count_work(arch, policy))
    return Clock(beats, tuple(seconds_of(k, rates) for k in index))


def _beat(stretch: Stretch, rates: Rates, index: dict[Kernel, int]) -> Beat:
    host, stall = sum(HOST[what] * n for what, n in stretch.host.items()), 0.0
    polynomials = {part: [0.0] * len(MONOMIALS) for part in PARTS}
    kernels: dict[str, Counter[int]] = {part: Counter() for part in PARTS}
    for (part, monomial), traffic in stretch.traffic.items():
        took = traffic.nbytes / rates.bandwidth + traffic.elements / rates.elements
        polynomials[part][monomial] += took
        polynomials[part][0] += traffic.kernels * rates.kernel
    for (part, kernel), count in stretch.kernels.items():
        place = "dequantize" if kernel.kind == "dequantize" else part
        kernels[place][index.setdefault(kernel, len(index))] += count
        launching = count * _launching(kernel, part, rates)
        host += launching
        if kernel.kind in SYNCHRONIZES and part != "backward":
            stall += launching
    return Beat(
        stretch.repeats,
        host,
        stall,
        tuple(
            (number, tuple(polynomials[part]), tuple(kernels[part].items()))
            for number, part in enumerate(PARTS)
            if any(polynomials[part]) or kernels[part]
        ),
    )


def _launching(kernel: Kernel, part: str, rates: Rates) -> float:
    """What a kernel costs the host beside its op."""
    if kernel.kind == "grouped product":
        *_, dtype, _, experts = kernel.figures
        if not rates.grouped or dtype != "bf16":
            return float(experts * HOST_EXPERT)
    backward = f"{kernel.kind} backward"
    return HOST[backward] if part == "backward" and backward in HOST else HOST.get(kernel.kind, 0.0)
