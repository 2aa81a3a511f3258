"""Stage 3's gathered weights: which are whole on the GPU, and when.

From the second step on the order of modules is known, and whenever a module is entered weights are
gathered ahead: as long as fewer than `stage3_max_live_parameters` elements are whole, a bucket of
`stage3_prefetch_bucket_size` elements, and one weight beyond either. A weight that has been used is
let go, unless its next use is near (`stage3_max_reuse_distance`) or was already looked at. The
coordinator is run here weight by weight, once for a model and its settings.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (_fetch_sub_module_impl,
release_sub_module, __params_to_release, update_recompute_parameters), runtime/zero/
parameter_offload.py (the hooks of _register_deepspeed_module).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from vramplan.memory.allocator import rounded
from vramplan.memory.precision import Policy
from vramplan.memory.ranks import PACKED, Weight, partitioned
from vramplan.models.architecture import Architecture

CONTAINERS = 4  # modules of a layer without weights of their own: itself, attention, MLP, its act
Place = tuple[str, int | str]


class Gathered(NamedTuple):
    """Bytes of weights that are whole beyond those that always are: the most in each place."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    inputs: tuple[int, int]
    """Before the layers, in forward and in backward."""
    head: tuple[int, int]
    loss: int
    """What is left when the head is through."""
    behind: int
    """When backward is through with the head."""
    graph: int
    """What packed weights' contexts keep until the loss is let go, included in all others."""

    def at(self, phase: str, place: int | str) -> int:
        """`place`: a layer's number, "inputs", "head" or "loss"."""
        back = phase == "backward"
        if isinstance(place, int):
            return (self.backward if back else self.forward)[place]
        if place == "loss":
            return self.loss
        return (self.inputs if place == "inputs" else self.head)[back]


class Use(NamedTuple):
    """A module's fetch (`weight` None: it has none) or its release."""

    kind: str
    """fetch; release; enter: a fetch whose release comes after the layer is run again; drop: let go
    of a frozen weight that was run again."""
    weight: int | None
    place: Place


@lru_cache(maxsize=256)
def gathered(
    arch: Architecture,
    policy: Policy,
    allocator: str,
    persistent: int,
    limits: tuple[int, int, int],
    kept: int,
    saves: bool,
) -> Gathered:
    """`persistent`: weights of at most so many elements are always whole, `kept` in all. `saves`:
    torch's own linear saves its whole weight for backward.

    `limits`: stage3_max_live_parameters, stage3_max_reuse_distance, stage3_prefetch_bucket_size.
    """
    weights = partitioned(arch, policy, allocator)
    uses = list(_uses(weights, arch.layers, policy))
    always = always_whole(weights, persistent, kept)
    if policy.quantization == "int8":  # Linear8bitLt.forward: weight.data = state.CB, kept whole
        always |= {i for i, w in enumerate(weights) if w.role == PACKED}
    coordinator = _Coordinator(weights, uses, always, limits, allocator)
    coordinator.saves(weights, saves and not policy.checkpointing, policy.checkpointing)
    peaks, ends = coordinator.run()

    def at(phase: str, place: int | str) -> int:
        return peaks.get((phase, place), 0)

    return Gathered(
        forward=tuple(at("forward", i) for i in range(arch.layers)),
        backward=tuple(at("backward", i) for i in range(arch.layers)),
        inputs=(at("forward", "inputs"), at("backward", "inputs")),
        head=(at("forward", "head"), at("backward", "head")),
        loss=ends["forward", "head"],
        behind=ends["backward", "head"],
        graph=sum(coordinator.sizes[i] for i in coordinator.in_graph),
    )


def always_whole(weights: Sequence[Weight], persistent: int, kept: int) -> set[int]:
    """Indices of what is never let go: Init._convert_to_deepspeed_param, in the order of making."""
    found, elements = set(), 0
    for index, w in enumerate(weights):
        if w.packed:
            found.add(index)
        elif w.numel <= persistent and elements + w.numel <= kept:
            found.add(index)
            elements += w.numel
    return found


def _uses(weights: Sequence[Weight], layers: int, policy: Policy) -> Iterator[Use]:
    """A step's fetches and releases in their order, forward and backward."""
    before = [i for i, w in enumerate(weights) if w.layer < 0 and not w.packed]
    heads = [i for i, w in enumerate(weights) if w.layer >= layers and not w.packed]
    inner: list[list[int]] = [[] for _ in range(layers)]
    for i, w in enumerate(weights):
        if 0 <= w.layer < layers and not w.packed:
            inner[w.layer].append(i)
    if not any(w.role == "head" for w in weights):  # tied
        heads += [i for i in before if weights[i].role == "embedding"][:1]
    yield from _used(weights, before, ("forward", "inputs"))
    for layer, mine in enumerate(inner):
        yield from (Use("fetch", None, ("forward", layer)) for _ in range(CONTAINERS))
        yield from _used(weights, mine, ("forward", layer))
    yield Use("fetch", None, ("forward", "head"))
    yield from _used(weights, heads, ("forward", "head"))
    yield from _used_back(heads, ("backward", "head"))
    for layer in reversed(range(layers)):
        place = ("backward", layer)
        if policy.checkpointing:
            yield from _run_again(weights, inner[layer], place)
        elif layer == 0 and not policy.trains_base:  # frozen, of an input without a gradient
            asked = [i for i in inner[0] if not weights[i].outer]
            yield from _used_back(asked, place)
        else:
            yield from _used_back(inner[layer], place)
    if policy.trains_base or policy.checkpointing:  # peft: enable_input_require_grads
        yield from _used_back(before, ("backward", "inputs"))


def _used(weights: Sequence[Weight], indices: Sequence[int], place: Place) -> Iterator[Use]:
    """Forward: each is fetched, used and let go. peft's layer reads its lora_A's dtype first, which
    makes that a parameter of its own (ZeROOrderedDict); its dropout has none."""
    for position, i in enumerate(indices):
        behind = indices[position + 1] if position + 1 < len(indices) else None
        if weights[i].role != "adapter" and behind is not None:
            if weights[behind].role == "adapter":
                yield Use("fetch", behind, place)
        elif weights[i].role == "adapter" and weights[indices[position - 1]].role != "adapter":
            yield Use("fetch", None, place)
        yield Use("fetch", i, place)
        yield Use("release", i, place)


def _used_back(indices: Sequence[int], place: Place) -> Iterator[Use]:
    for i in reversed(indices):
        yield Use("fetch", i, place)
        yield Use("release", i, place)


def _run_again(weights: Sequence[Weight], mine: list[int], place: Place) -> Iterator[Use]:
    """A checkpointed layer's backward: it is run again when its last module unpacks what it saved.

    Frozen weights that were fetched for that belong to the module that asked, and go with it.
    """
    if not mine:
        return
    last = mine[-1]
    yield Use("enter", last, place)
    yield from (Use("fetch", None, place) for _ in range(CONTAINERS))
    yield from _used(weights, mine, place)
    for i in reversed(mine):
        if i != last:
            yield Use("fetch", i, place)
        yield Use("release" if i != last else "leave", i, place)
        if i == last:
            yield from (Use("drop", k, place) for k in mine if not weights[k].trains)


class _Batch:
    """Weights that were gathered at once, by one collective a dtype."""

    __slots__ = ("nbytes", "unpacked", "waiting")

    def __init__(self, waiting: set[int], nbytes: int) -> None:
        self.waiting, self.nbytes, self.unpacked = waiting, nbytes, False


class _Coordinator:
    """PartitionedParameterCoordinator through one step whose trace is complete."""

    def __init__(
        self,
        weights: Sequence[Weight],
        uses: Sequence[Use],
        always: set[int],
        limits: tuple[int, int, int],
        allocator: str,
    ) -> None:
        self.uses, self.always = uses, always
        self.max_live, self.max_reuse, self.bucket = limits
        self.numels = [w.numel for w in weights]
        self.sizes = [rounded(w.nbytes, allocator) for w in weights]
        steps = [use.weight for use in uses if use.kind in ("fetch", "enter")]
        self.passed = [0]  # elements used before each step
        for i in steps:
            self.passed.append(self.passed[-1] + (0 if i is None else self.numels[i]))
        self.steps_of: dict[int, list[int]] = {}
        for step, i in enumerate(steps):
            if i is not None:
                self.steps_of.setdefault(i, []).append(step)
        self.queue = deque((i, step) for step, i in enumerate(steps) if i is not None)
        self.looked_at: dict[int, int] = {}  # the last use that was met in the queue
        self.whole, self.entered = set(always), set[int]()
        self.by_node, self.by_graph = set[int](), set[int]()
        self.in_forward = True
        self.saved: dict[int, bool] = {}  # gathered in forward: whether since let go
        self.in_graph: set[int] = set()
        self.batches: dict[int, _Batch] = {}
        self.numel = self.live = self.step = self.most = 0

    def saves(self, weights: Sequence[Weight], linears: bool, checkpointing: bool) -> None:
        """Whose storage, as gathered in forward, autograd holds: to a node's end, or to the
        graph's (bitsandbytes' MatMul4Bit keeps the packed weight on its context)."""
        for i, w in enumerate(weights):
            if linears and w.role in ("linear", "head"):
                self.by_node.add(i)
            needed = checkpointing or w.layer or not w.outer  # else the input has no gradient
            if w.role == PACKED and needed:
                self.by_graph.add(i)
        self.by_graph -= self.always
        self.by_node -= self.always

    def run(self) -> tuple[dict[Place, int], dict[Place, int]]:
        """The most bytes in each place, and those at its end."""
        peaks: dict[Place, int] = {}
        ends: dict[Place, int] = {}
        for use in self.uses:
            self.in_forward = use.place[0] == "forward"
            if use.kind in ("fetch", "enter"):
                self._fetch(use.weight)
                if use.kind == "enter" and use.weight is not None:
                    self.entered.add(use.weight)
            elif use.weight is not None:
                if use.kind == "leave":
                    self.entered.discard(use.weight)
                self._release(use.weight, use.kind == "drop")
            ends[use.place] = self.live
            peaks[use.place] = max(peaks.get(use.place, 0), self.live, self.most)
            self.most = 0
        return peaks, ends

    def _gather(self, i: int) -> None:
        self.whole.add(i)
        if self.in_forward and (i in self.by_graph or i in self.by_node):
            self.saved[i] = False
        self.numel += self.numels[i]
        self.live += self.sizes[i]

    def _fetch(self, weight: int | None) -> None:
        if weight is not None:
            if weight not in self.whole:
                self._gather(weight)
            self._unpack(weight)
            if self.looked_at.get(weight, -1) < self.step:
                i, step = self.queue.popleft()
                self.looked_at[i] = step
        room, ahead = min(self.max_live - self.numel, self.bucket), 0
        together = []
        while self.queue and ahead < room:
            i, step = self.queue.popleft()
            self.looked_at[i] = max(self.looked_at.get(i, -1), step)
            if i not in self.whole:
                self._gather(i)
                ahead += self.numels[i]
                together.append(i)
        if len(together) > 1:
            batch = _Batch(set(together), sum(self.sizes[i] for i in together))
            self.batches.update(dict.fromkeys(together, batch))
        self.step += 1

    def _unpack(self, weight: int) -> None:
        """What was gathered at once is copied out of its flat tensor for the first of its weights,
        and the tensor lives until the last of them is asked for (AllGatherCoalescedHandle)."""
        batch = self.batches.pop(weight, None)
        if batch is None:
            return
        if not batch.unpacked:
            batch.unpacked = True
            self.live += batch.nbytes
            self.most = max(self.most, self.live)
        batch.waiting.discard(weight)
        if not batch.waiting:
            self.live -= batch.nbytes

    def _release(self, i: int, anyway: bool) -> None:
        if i in self.always or i not in self.whole or i in self.entered or i in self.batches:
            return  # the last: still on its way
        if not anyway and (self.looked_at.get(i, -1) > self.step or self._is_near(i)):
            return
        self.whole.discard(i)
        self.numel -= self.numels[i]
        if self.saved.get(i) is False:  # this very storage
            self.saved[i] = True
            if i in self.by_graph:
                self.in_graph.add(i)
            elif not self.in_forward:
                self.live -= self.sizes[i]
        else:
            again = i in self.by_node and self.saved.pop(i, False) and not self.in_forward
            self.live -= self.sizes[i] * (2 if again else 1)

    def _is_near(self, i: int) -> bool:
        """Whether it is used again before so many elements have been."""
        steps = self.steps_of[i]
        k = bisect_left(steps, self.step)
        return k < len(steps) and self.passed[steps[k]] - self.passed[self.step] < self.max_reuse
