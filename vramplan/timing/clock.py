"""From counted work to seconds: a clock for the card and one for the host that feeds it.

A stretch's kernels run one after the other on the card; the host's thread launches them ahead. Over
a stretch of even work the card is done when its own work is, or when the host's is, whichever comes
later.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from operator import mul
from typing import NamedTuple

from vramplan.hardware.gpu import Gpu
from vramplan.memory.precision import Policy
from vramplan.memory.program import MONOMIALS, powers_of
from vramplan.models.architecture import Architecture
from vramplan.timing.kernels import DEQUANTIZING, Seconds, seconds_of
from vramplan.timing.rates import GATHERED, HOST, HOST_EXPERT, MODULE, Rates, rates_of
from vramplan.timing.work import Kernel, Stretch, count_work

Work = tuple[tuple[float, ...], tuple[float, ...]]
"""Pointwise seconds, a polynomial in batch and sequence; and how many there are of each kernel."""
PARTS = ("forward", "recompute", "backward", "dequantize")
THROTTLED, COOL = 1.18, 0.45
"""Products without a break run into the card's power limit: 662 TFLOP/s after half a second, 780
before (H200, 700 W). Where they take no more than this share of the time they don't: 78.1 ms of
them in a step of 171 ms ran at 777."""
UNEVEN = 5.0
"""Work within a stretch is uneven, so that the card and the host wait for each other by turns: the
shorter of the two adds to the longer as in a norm of this order (6 % where it is 4/5 of it)."""
MODULES = {"linear": 1, "adapter": 4, "layer": 6}
"""Modules that are called, by what is counted of them: an adapter's two linears, its dropout and
the layer that it wraps; a layer itself, its attention, its MLP with an activation, two norms."""
SYNCHRONIZES = ("int8",)
"""Kinds whose host waits for the card (int8 asks how many outliers there are), so that the card
then waits for the host."""


class Beat(NamedTuple):
    """A stretch, ready to be evaluated."""

    repeats: int
    host: float
    """Seconds of launching."""
    stall: float
    """Seconds that the card waits however far the host is ahead."""
    work: Work


class Spent(NamedTuple):
    """Seconds of a micro-batch."""

    total: float
    parts: tuple[float, ...]
    """The card's, by PARTS; what is missing to the total is waiting for the host."""


class Clock(NamedTuple):
    """A step's work on one card."""

    beats: tuple[Beat, ...]
    parts: tuple[Work, ...]
    """The whole step's, by PARTS."""
    products: tuple[float, ...]
    """How many there are of each kernel in the whole step, where it is a product (THROTTLED)."""
    kernels: tuple[Seconds, ...]
    calls: int
    """Of modules, forward, recomputed and backward."""

    def run(self, batch: int, seq: int, hooks: float = 0.0) -> Spent:
        """A micro-batch, forward and backward; `hooks`: seconds more of the host, spread evenly."""
        powers = powers_of(batch, seq)
        times = [seconds(powers) for seconds in self.kernels]
        slower = 1 + hooks / sum(beat.repeats * beat.host for beat in self.beats)
        host = card = 0.0
        for repeats, launching, stall, (polynomial, counts) in self.beats:
            working = stall + sum(map(mul, polynomial, powers)) + sum(map(mul, counts, times))
            host += repeats * launching * slower
            card = max(card + repeats * working, host)
        parts = [sum(map(mul, p, powers)) + sum(map(mul, n, times)) for p, n in self.parts]
        busy, dense = sum(parts), sum(map(mul, self.products, times))
        share = dense / card
        if share > COOL:
            hot = dense * (THROTTLED - 1) * (share - COOL) / (1 - COOL)
            card += hot
            parts = [part * (1 + hot / busy) for part in parts]
            busy += hot
        less = min(host, busy)
        total = (card**UNEVEN + less**UNEVEN) ** (1 / UNEVEN)
        return Spent(total, tuple(parts))


@lru_cache(maxsize=4096)
def micro_batch(
    arch: Architecture, policy: Policy, gpu: Gpu, batch: int, seq: int, gathered: int = 0
) -> Spent:
    """Seconds of a micro-batch of `batch` x `seq` tokens, without Trainer's own.

    `gathered`: tensors that ZeRO-3 gathers and reduces, with a hook around every module.
    """
    clock = clock_of(arch, _essential(policy), gpu)
    if not gathered:
        return clock.run(batch, seq)
    hooks = clock.calls * MODULE + gathered * GATHERED
    return clock.run(batch, seq, rates_of(gpu).host * hooks)


def _essential(policy: Policy) -> Policy:
    """What barely moves time is left out, so that few programs are compiled."""
    return replace(policy, single_sequence=False, accumulating=False)


@lru_cache(maxsize=1024)
def clock_of(arch: Architecture, policy: Policy, gpu: Gpu) -> Clock:
    """Compiled once for a model, a policy and a card."""
    rates = rates_of(gpu, policy.attention == "flash_attention_2")
    stretches = count_work(arch, policy)
    kernels = list(dict.fromkeys(kernel for s in stretches for _, kernel in s.kernels))
    index = {kernel: k for k, kernel in enumerate(kernels)}
    whole = [_nothing(len(kernels)) for _ in PARTS]
    beats = []
    for s in stretches:
        work = _nothing(len(kernels))
        for (part, monomial), traffic in s.traffic.items():
            took = traffic.nbytes / rates.bandwidth + traffic.elements / rates.elements
            for (polynomial, _), times in ((work, 1), (whole[PARTS.index(part)], s.repeats)):
                polynomial[monomial] += times * took
                polynomial[0] += times * traffic.kernels * rates.kernel
        for (part, kernel), count in s.kernels.items():
            place = "dequantize" if kernel.kind in DEQUANTIZING else part
            work[1][index[kernel]] += count
            whole[PARTS.index(place)][1][index[kernel]] += s.repeats * count
        beats.append(Beat(s.repeats, *_launching(s, rates), _frozen(work)))
    counts = [sum(n) for n in zip(*(part[1] for part in whole), strict=True)]
    products = [n * _heats(k) for k, n in zip(kernels, counts, strict=True)]
    return Clock(
        tuple(beats),
        tuple(map(_frozen, whole)),
        tuple(products),
        tuple(seconds_of(k, rates) for k in kernels),
        sum(_calls(s) for s in stretches),
    )


def _calls(stretch: Stretch) -> int:
    """Of modules in all repetitions; what runs forward has its backward counted with it. What is
    recomputed stands in a stretch of backward."""
    called = sum(times * stretch.host[what] for what, times in MODULES.items())
    return stretch.repeats * called * (2 if stretch.phase == "forward" else 1)


def _heats(kernel: Kernel) -> bool:
    """A product of the tensor cores; those in fp32 were not seen to slow down."""
    return kernel.kind.endswith("product") and "fp32" not in kernel.figures


def _nothing(kernels: int) -> tuple[list[float], list[float]]:
    return [0.0] * len(MONOMIALS), [0.0] * kernels


def _frozen(work: tuple[list[float], list[float]]) -> Work:
    return tuple(work[0]), tuple(work[1])


def _launching(stretch: Stretch, rates: Rates) -> tuple[float, float]:
    """Seconds that the host launches a stretch, and those for which the card waits at any rate."""
    host, stall = sum(HOST[what] * n for what, n in stretch.host.items()), 0.0
    for (part, kernel), count in stretch.kernels.items():
        each = count * _launching_one(kernel, part, rates)
        host += each
        if kernel.kind in SYNCHRONIZES and part != "backward":
            stall += each
    return rates.host * host, rates.host * stall


def _launching_one(kernel: Kernel, part: str, rates: Rates) -> float:
    """What a kernel costs the host beside its op."""
    if kernel.kind == "grouped product":
        *_, dtype, _, experts = kernel.figures
        if not rates.grouped or dtype != "bf16":
            return float(experts * HOST_EXPERT)
    backward = f"{kernel.kind} backward"
    return HOST[backward] if part == "backward" and backward in HOST else HOST.get(kernel.kind, 0.0)
