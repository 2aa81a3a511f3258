"""ZeRO's sizes for a card: what the buffers may take of the memory that a run leaves.

A figure that the recipe sets stays. One that it leaves at its default is open: it is spent where
there is room, and spared where there is not. Every trial is an estimate of the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from vramplan.hardware.gpu import Gpus
from vramplan.memory.estimate import estimate
from vramplan.memory.host import Host
from vramplan.memory.precision import policy_of
from vramplan.memory.ranks import partition, weights_in_order
from vramplan.models.architecture import Architecture
from vramplan.recipe.deepspeed import AUTO, DeepSpeed
from vramplan.recipe.ds_config import counts_in, only_what_counts
from vramplan.recipe.recipe import Recipe
from vramplan.units import format_bytes

MILLION = 10**6
SHARE = 2
"""Buffers take at most one part in two of what is left: the rest is for what an estimate of equal
steps does not see, such as evaluation. A choice, not a measurement."""
BUCKETS = tuple(n * MILLION for n in (500, 200, 100, 50, 20, 10, 5, 2, 1))
"""Elements, tried from the largest: DeepSpeed's own default, 5e8, is the most."""
ELEMENTS = tuple(n * MILLION for n in (1000, 500, 200, 100, 50, 20, 10))
"""Elements of a sub-group, or gathered at a time: from DeepSpeed's default, 1e9, down."""
NVME_GROUP = 100 * MILLION
"""Elements of a sub-group that goes through NVMe: its buffers are pinned host memory."""
_DEFAULT = DeepSpeed()


@dataclass(slots=True)
class Sizes:
    """The recipe with every "auto" of ZeRO resolved, and the reason for each size."""

    recipe: Recipe
    reasons: dict[str, str] = field(default_factory=dict)
    required: int | None = None
    """Bytes of the card that the run needs; None where no card is known."""
    available: int | None = None
    host: Host = field(default_factory=Host)

    @property
    def zero(self) -> DeepSpeed:
        assert self.recipe.deepspeed is not None
        return self.recipe.deepspeed

    def set(self, reason: str, **values: object) -> None:
        """Values of ZeRO's fields, with one reason for all of them."""
        self.recipe = replace(self.recipe, deepspeed=replace(self.zero, **values))  # type: ignore[arg-type]
        self.reasons.update(dict.fromkeys(values, reason))


def sized(arch: Architecture, recipe: Recipe, gpus: Gpus | None) -> Sizes:
    """The sizes for these cards. Without cards they are what "auto" and the defaults mean.

    Raises IllegalRecipe for what the model can't be run with.
    """
    assert recipe.deepspeed is not None
    open_ = {f.name for f in fields(DeepSpeed) if _is_open(recipe.deepspeed, f.name)}
    open_ &= set(counts_in(recipe.deepspeed))
    sizes = Sizes(replace(recipe, deepspeed=only_what_counts(recipe.deepspeed)))
    _resolve(sizes, arch, open_)
    _for_nvme(sizes, arch, open_)
    if gpus is not None:
        trial = _Trial(sizes, arch, gpus, open_)
        trial.alone()
        if trial.first > trial.room:
            trial.spare()
        else:
            trial.spend()
    found = estimate(arch, sizes.recipe, gpus)
    assert found.sharded is not None
    sizes.host = found.sharded.host
    if gpus is not None:
        sizes.required, sizes.available = found.required, found.available
    return sizes


def _is_open(zero: DeepSpeed, name: str) -> bool:
    return bool(getattr(zero, name) == getattr(_DEFAULT, name))


def _resolve(sizes: Sizes, arch: Architecture, open_: set[str]) -> None:
    """What transformers would fill in for "auto", in figures."""
    zero = sizes.zero
    hidden = arch.hidden_size
    filled = zero.sizes(hidden)
    auto = {
        "reduce_bucket_size": (filled["reduce_bucket"], f"{hidden} x {hidden}"),
        "stage3_prefetch_bucket_size": (filled["prefetch_bucket"], f"0.9 x {hidden} x {hidden}"),
        "stage3_param_persistence_threshold": (
            filled["persistence_threshold"],
            f"10 x {hidden}",
        ),
    }
    for name, (value, formula) in auto.items():
        if getattr(zero, name) == AUTO and name in counts_in(zero):
            sizes.set(f"{formula} of the hidden size, as transformers fills in", **{name: value})
    for name in sorted(counts_in(zero)):
        if name not in auto and name not in open_:
            sizes.reasons[name] = "as the recipe says"
    for name in auto:
        if name not in open_ and name in counts_in(zero):
            sizes.reasons[name] = "as the recipe says"


def _for_nvme(sizes: Sizes, arch: Architecture, open_: set[str]) -> None:
    """A buffer of weights has to hold the largest piece of one (partitioned_param_swapper.py)."""
    zero, ranks = sizes.zero, sizes.recipe.world_size
    if zero.offload_param == "nvme" and "param_buffer_size" in open_:
        policy = policy_of(sizes.recipe, arch)
        weights = weights_in_order(arch, policy, sizes.recipe.allocator)
        most = max(partition(w.numel, ranks) for w in weights if not w.packed)
        if most > zero.param_buffer_size:
            sizes.set(
                f"the largest weight has {most} elements on a rank, and DeepSpeed refuses a "
                "smaller buffer",
                param_buffer_size=most,
            )


class _Trial:
    """Tries sizes on the estimate of the run. Sizes in bytes are of one card."""

    def __init__(self, sizes: Sizes, arch: Architecture, gpus: Gpus, open_: set[str]) -> None:
        self.sizes, self.arch, self.gpus, self.open = sizes, arch, gpus, open_
        found = estimate(arch, sizes.recipe, gpus)
        assert found.available is not None
        self.room, self.trained = found.available, found.trainable_parameters
        self.first = found.required

    def need(self, **values: object) -> int:
        zero = replace(self.sizes.zero, **values)  # type: ignore[arg-type]
        return estimate(self.arch, replace(self.sizes.recipe, deepspeed=zero), self.gpus).required

    def said(self, nbytes: int) -> str:
        return f"{format_bytes(nbytes)} of {format_bytes(self.room)}"

    def alone(self) -> None:
        """What pays nothing whatever the room: a second bucket for one rank, an overlong one."""
        zero, ranks = self.sizes.zero, self.sizes.recipe.world_size
        alone = zero.stage in (1, 2) and ranks == 1 and "overlap_comm" in self.open
        if alone and self.need(overlap_comm=False) <= self.first:
            reason = "one rank reduces nothing: a second bucket pays nothing"
            self.sizes.set(reason, overlap_comm=False)
        bucket = zero.reduce_bucket_size
        if "reduce_bucket_size" in self.open and isinstance(bucket, int) and bucket > self.trained:
            self.sizes.set(
                f"all {self.trained} gradients are in one bucket: a longer one stays empty",
                reduce_bucket_size=self.trained,
            )
        if zero.offload_optimizer == "nvme" and "sub_group_size" in self.open:
            self.sizes.set(
                "each buffer of pinned host memory for NVMe is as large as a sub-group in fp32: "
                f"{format_bytes(NVME_GROUP * 4)}",
                sub_group_size=NVME_GROUP,
            )
        self.first = self.need()

    def spend(self) -> None:
        """The largest reduce bucket in the buffers' share of what is left."""
        sizes, left = self.sizes, self.room - self.first
        budget = self.first + left // SHARE
        kept = f"the run needs {self.said(self.first)}: nothing has to be spared"
        for name in ("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"):
            if name in self.open and name not in sizes.reasons:
                sizes.reasons[name] = kept
        self._longer_bucket(left, budget)
        self._say_overlap()

    def _longer_bucket(self, left: int, budget: int) -> None:
        sizes = self.sizes
        if "reduce_bucket_size" not in self.open:
            return
        if sizes.recipe.world_size == 1:
            sizes.reasons["reduce_bucket_size"] += "; one rank reduces nothing, so no longer"
            return
        now = sizes.zero.reduce_bucket_size
        assert isinstance(now, int)
        for bucket in BUCKETS:
            bucket = min(bucket, self.trained)
            if bucket <= now:
                return
            if self.need(reduce_bucket_size=bucket) <= budget:
                sizes.set(
                    f"{format_bytes(left)} of the card are left, and buffers may take half of it: "
                    "the longest bucket that does, for the fewest reductions"
                    + ("; all gradients are in it" if bucket == self.trained else ""),
                    reduce_bucket_size=bucket,
                )
                return

    def _say_overlap(self) -> None:
        zero = self.sizes.zero
        if zero.stage == 0 or "overlap_comm" in self.sizes.reasons:
            return
        if zero.stage == 3:
            said = "gradients are reduced while backward runs on; stage 3 has no second bucket"
            self.sizes.reasons["overlap_comm"] = said
            return
        cost = self.need() - self.need(overlap_comm=False)
        if cost > 0:
            second = f"its second bucket costs {format_bytes(cost)}, which are left"
        elif cost == 0:
            second = "its second bucket is not there at the peak"
        else:  # stage 1: a gradient that is reduced beside backward is let go of at once
            second = (
                f"without it {format_bytes(-cost)} more would be needed, of gradients that wait"
            )
        self.sizes.reasons["overlap_comm"] = (
            f"gradients are reduced while backward runs on; {second}"
        )

    def spare(self) -> None:
        """What costs least speed first, until the run fits; what spares nothing stays."""
        self._lower("sub_group_size", ELEMENTS, "the step takes smaller sub-groups")
        self._lower(
            "stage3_max_live_parameters",
            ELEMENTS,
            "fewer weights are gathered ahead",
            "stage3_max_reuse_distance",
        )
        self._lower("overlap_comm", (False,), "the second bucket is spared, reductions wait")
        self._lower("reduce_bucket_size", BUCKETS, "a shorter bucket, more reductions")

    def _lower(self, name: str, ladder: tuple[int, ...], what: str, also: str = "") -> None:
        now = self.need()
        if now <= self.room or name not in self.open:
            return
        best: tuple[int, dict[str, int]] = (now, {})
        for value in ladder:
            values = {name: value}
            if also and also in self.open:
                values[also] = value
            if value >= getattr(self.sizes.zero, name):
                continue
            then = self.need(**values)
            if then < best[0]:
                best = (then, values)
            if then <= self.room:
                break
        then, values = best
        if values:
            verdict = "" if then <= self.room else ", still too much"
            needs = f"{self.said(now)} would be needed, with this {format_bytes(then)}"
            self.sizes.set(f"{what}: {needs}{verdict}", **values)
