"""Evaluating a space: what every draft needs, whether it fits, and how long its step takes.

Plain runs on one card share the walk through their program: for a micro-batch it is the same under
every optimizer. Four bounds save most of the work, and change no answer: a draft that another one
is no worse than (space.NO_BETTER) is not evaluated; where weights, states and gradients alone
exceed the card, or a smaller micro-batch does, nothing is compiled; and where only the pick is
asked for (Space.whole False),
what is offloaded comes last, and a method that has a plan on the cards ends the search, as nothing
after it can be picked (rank.picked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from vramplan.errors import UserError
from vramplan.hardware.gpu import Gpus
from vramplan.hardware.measured_overheads import Measured, overhead_of
from vramplan.memory import allocator
from vramplan.memory.estimate import Estimate, estimate
from vramplan.memory.optimizer_states import FP32, state_tensors
from vramplan.memory.optimizers import stepping
from vramplan.memory.precision import Policy, policy_of
from vramplan.memory.program import Point, Program
from vramplan.memory.ranks import weights_in_order
from vramplan.memory.states import Trained, layout
from vramplan.memory.timeline import Parts, parts, run_timeline
from vramplan.models.architecture import Architecture
from vramplan.planner.candidates import FITS, HOST, TOO_LARGE, Candidate, offloads
from vramplan.planner.space import NO_BETTER, Draft, Refusal, Space
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.recipe import Recipe
from vramplan.timing.links import paging_seconds

Clock = Callable[[Architecture, Recipe, Gpus], float | None]
"""Seconds of an optimizer step; None where the card's rates are not known."""


class Sizes(NamedTuple):
    """Bytes that decide whether a recipe fits."""

    required: int
    managed: int
    host: int


Memory = dict[tuple[Recipe, "Kind"], Sizes]
"""By recipe and kind of card: nothing else of a card changes what a run needs."""


class Kind(NamedTuple):
    """What of a card an estimate reads."""

    capability: str | None
    overheads: tuple[Measured | None, ...]
    """What runs on this machine measured beside the allocator."""


def kind_of(gpus: Gpus) -> Kind:
    """The kind of `gpus`."""
    measured = (
        overhead_of(gpus, quantization, zero=zero)
        for quantization in (None, "int8")
        for zero in (False, True)
    )
    return Kind(None if gpus.nominal else gpus.gpu.compute_capability, tuple(measured))


class Walks:
    """A program that remembers its walks."""

    __slots__ = ("_found", "_program", "epilogues")

    def __init__(self, program: Program) -> None:
        self._program = program
        self._found: dict[tuple[int, int], list[Point]] = {}
        self.epilogues = program.epilogues

    def walk(self, batch: int, seq: int) -> list[Point]:
        """As Program.walk."""
        key = (batch, seq)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._program.walk(batch, seq)
        return found


class Evaluator:
    """What recipes of one model need on cards of one kind."""

    def __init__(
        self,
        arch: Architecture,
        gpus: Gpus,
        host_memory: int | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.arch, self.gpus, self.host_memory = arch, gpus, host_memory
        self._memory: Memory = {} if memory is None else memory
        gpu = gpus.gpu
        self._capability = None if gpus.nominal else gpu.compute_capability
        self._kind = kind_of(gpus)
        self._walks: dict[int, tuple[Program, Any]] = {}
        self.available = gpu.capacity if gpus.free is None else gpus.free

    def sizes(self, recipe: Recipe) -> Sizes:
        """What of `needed` decides, remembered for cards of the same kind."""
        key = (recipe, self._kind)
        found = self._memory.get(key)
        if found is None:
            needed = self.needed(recipe)
            found = Sizes(needed.required, needed.managed, _host(needed))
            self._memory[key] = found
        return found

    def needed(self, recipe: Recipe) -> Estimate:
        """As `estimate` says it. Legality is the space's."""
        if recipe.deepspeed is not None or recipe.world_size > 1:
            return estimate(self.arch, recipe, self.gpus)
        policy = policy_of(recipe, self.arch, self._capability)
        run = parts(self.arch, policy, recipe.optimizer, recipe.allocator)
        workspace = allocator.workspaces(self._capability, run.program.epilogues)
        timeline = run_timeline(
            self._remembering(run),
            recipe.batch_size,
            recipe.seq_len,
            recipe.gradient_accumulation_steps,
            workspace,
        )
        return Estimate(
            id=self.arch.family,
            architecture=self.arch,
            recipe=recipe,
            gpu=self.gpus,
            timeline=timeline,
            managed=run.stepping.managed,
            workspace=workspace,
            parts=run,
            policy=policy,
        )

    def _remembering(self, run: Parts) -> Parts:
        return run._replace(program=self._walking(run.program))

    def _walking(self, program: Program) -> Any:
        # Keyed by identity, since a program is too large to hash; kept, so that it stays unique.
        found = self._walks.get(id(program))
        if found is None:
            found = self._walks[id(program)] = (program, Walks(program))
        return found[1]

    def floor(self, recipe: Recipe) -> int:
        """Bytes that a run needs at the least, without compiling it: what stays and gradients at
        the step; under ZeRO the rank's share of weights, masters and states."""
        policy = policy_of(recipe, self.arch, self._capability)
        if recipe.deepspeed is not None:
            return zero_floor(self.arch, policy, recipe, recipe.deepspeed)
        weights = layout(self.arch, policy, recipe.allocator)
        optimizer = find_optimizer(recipe.optimizer)
        steps = stepping(optimizer, weights, recipe.allocator, policy.projection)
        gradients = 0 if steps.in_backward else weights.gradients
        stays = weights.weights + steps.states + gradients
        return stays + allocator.slack(stays, recipe.allocator)

    def outgrown(self, recipe: Recipe, before: Candidate | None) -> int:
        """Bytes that a run needs at the least, as the same with a smaller micro-batch (`before`)
        needs so many; 0 where that is another run. Without accumulation no gradients lie there
        while the next micro-batch runs forward."""
        if before is None or before.required is None:
            return 0
        was = before.recipe
        sizes = ("batch_size", "gradient_accumulation_steps")
        if replace(recipe, **{name: getattr(was, name) for name in sizes}) != was:
            return 0
        if recipe.gradient_accumulation_steps > 1 or was.gradient_accumulation_steps == 1:
            return before.required
        if recipe.deepspeed is not None:
            return 0
        policy = policy_of(recipe, self.arch, self._capability)
        held = layout(self.arch, policy, recipe.allocator).gradients
        return before.required - held - held * allocator.SLACK_PERCENT[recipe.allocator] // 100


def zero_floor(arch: Architecture, policy: Policy, recipe: Recipe, zero: DeepSpeed) -> int:
    """As Evaluator.floor. Padding and persistent weights only add to it."""
    weights = weights_in_order(arch, policy, recipe.allocator)
    shared = recipe.world_size if zero.stage == 3 else 1
    held = 0 if zero.offload_param else sum(w.nbytes for w in weights) // shared
    if zero.stage and not zero.offload_optimizer:
        mine = sum(w.numel for w in weights if w.trains) // recipe.world_size
        flat = Trained("flat", mine, FP32, 1, False, (mine,))
        states = state_tensors(find_optimizer(recipe.optimizer), flat)
        held += mine * FP32 + sum(n for n, paged in states if n > FP32 and not paged)
    return held + allocator.slack(held, recipe.allocator)


class Searched(NamedTuple):
    """A space, evaluated."""

    candidates: list[Candidate]
    refused: list[Refusal]
    """What was refused only when it was evaluated."""
    evaluated: int
    """Of them, those whose memory was reckoned in full."""


def search(space: Space, evaluator: Evaluator, clock: Clock, *, pruning: bool = True) -> Searched:
    """Every draft of `space` with its verdict. `pruning` False evaluates what no plan is better
    for as well: it finds the same plans, later."""
    found: list[Candidate] = []
    refused: list[Refusal] = []
    evaluated = 0
    settled = None  # the method that has a plan on the cards
    before = None
    drafts: Iterable[Draft] = space.drafts()
    if not space.whole:
        drafts = sorted(drafts, key=lambda draft: offloads(draft.recipe))
    for draft in drafts:
        settles = draft.method == settled and not offloads(draft.recipe)
        if settled and not settles and not space.whole:
            break
        if draft.verdict and (pruning or draft.verdict != NO_BETTER):
            found.append(_unevaluated(draft))
            continue
        try:
            candidate = before = judged(draft, evaluator, before, pruning=pruning)
        except UserError as error:  # what only the model's sizes show
            refused.append(Refusal(draft.method, str(error)))
            continue
        evaluated += not candidate.at_least
        found.append(timed(candidate, evaluator, clock) if candidate.fits else candidate)
        if settled is None and candidate.fits and candidate.stays:
            settled = draft.method
    return Searched(found, refused, evaluated)


def _unevaluated(draft: Draft) -> Candidate:
    return Candidate(method=draft.method, recipe=draft.recipe, verdict=draft.verdict, why=draft.why)


def judged(
    draft: Draft, evaluator: Evaluator, before: Candidate | None = None, *, pruning: bool = True
) -> Candidate:
    """A draft with its memory and its verdict; `before`: the one that was judged before it."""
    available = evaluator.available
    if pruning:
        floor = max(evaluator.floor(draft.recipe), evaluator.outgrown(draft.recipe, before))
        if floor > available:
            return Candidate(
                method=draft.method,
                recipe=draft.recipe,
                verdict=TOO_LARGE,
                required=floor,
                at_least=True,
                available=available,
            )
    needed = evaluator.sizes(draft.recipe)
    required = needed.required
    paged_out = min(needed.managed, max(0, required + needed.managed - available))
    host = needed.host + paged_out * draft.recipe.world_size
    verdict = FITS if required <= available else TOO_LARGE
    limit = evaluator.host_memory
    if verdict == FITS and limit is not None and host > limit:
        verdict = HOST
    return Candidate(
        method=draft.method,
        recipe=draft.recipe,
        verdict=verdict,
        required=required,
        available=available,
        host=host,
        managed=needed.managed,
        paged_out=paged_out if verdict != TOO_LARGE else 0,
    )


def _host(needed: Estimate) -> int:
    """Host memory of all ranks while they train, or, if that is more, while they load."""
    host = needed.host
    if host is None:
        return 0
    return needed.recipe.world_size * max(host.pinned + host.pageable, host.loading)


def timed(candidate: Candidate, evaluator: Evaluator, clock: Clock) -> Candidate:
    """The candidate with the time of its step."""
    recipe = candidate.recipe
    seconds = clock(evaluator.arch, recipe, evaluator.gpus)
    if seconds is not None and candidate.paged_out:
        seconds += paging_seconds(candidate.paged_out, evaluator.gpus.gpu)
    tokens = (
        recipe.batch_size * recipe.seq_len * recipe.gradient_accumulation_steps * recipe.world_size
    )
    return replace(candidate, seconds=seconds, tokens=tokens)


def nearest_misses(candidates: Sequence[Candidate], evaluator: Evaluator) -> Iterator[Candidate]:
    """Of each method of which nothing fits, the candidate that needs least, exactly; where one
    lacks only host memory, the one that needs least of that."""
    for method in dict.fromkeys(c.method for c in candidates):
        mine = [c for c in candidates if c.method == method and c.required is not None]
        if not mine or any(c.fits for c in mine):
            continue
        hosted = [c for c in mine if c.verdict == HOST]
        if hosted:
            yield min(hosted, key=lambda c: c.host)
        else:
            yield _least_exact(sorted(mine, key=lambda c: c.required or 0), evaluator)


def _least_exact(rising: list[Candidate], evaluator: Evaluator) -> Candidate:
    """Bounds are at most what is needed: once one exceeds the best exact figure, none is better."""
    best: Candidate | None = None
    for candidate in rising:
        if best is not None and (candidate.required or 0) >= (best.required or 0):
            break
        if candidate.at_least:
            draft = Draft(candidate.method, candidate.recipe, "", "")
            candidate = judged(draft, evaluator, pruning=False)
        if best is None or (candidate.required or 0) < (best.required or 0):
            best = candidate
    assert best is not None
    return best
