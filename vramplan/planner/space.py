"""Every recipe that could reach a goal on some cards: legal by construction, the pins honoured.

What no plan is better for is in the space too, with the reason: it is counted, and not evaluated
unless it is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from vramplan.errors import UnknownName, UserError
from vramplan.hardware.catalogue import warnings_for
from vramplan.hardware.gpu import Gpu
from vramplan.memory.legality import WITHOUT_FLASH_ATTENTION_2, WITHOUT_SDPA, check_model
from vramplan.models.architecture import Architecture
from vramplan.models.tensors import inventory
from vramplan.planner.goal import ZERO_PINS, Goal, quantizations
from vramplan.recipe.deepspeed import DeepSpeed
from vramplan.recipe.recipe import LoRA, Recipe

NO_BETTER = "no better"
"""Another recipe of the space needs no more memory and no more time, and learns the same."""
LOWER = "lower precision"
"""It would round more than it has to. Only where it is pinned."""
MISSING = "not installed"


class Choice(NamedTuple):
    """One value of a field."""

    value: Any
    verdict: str = ""
    """NO_BETTER, LOWER or MISSING; empty: worth evaluating."""
    why: str = ""


class Draft(NamedTuple):
    """A legal recipe before it is evaluated."""

    method: str
    recipe: Recipe
    verdict: str
    why: str


class Refusal(NamedTuple):
    """A combination that was not proposed, and the libraries' reason."""

    method: str
    reason: str


class Space:
    """The recipes for a model, up to `count` cards of one kind, and a goal."""

    def __init__(
        self, arch: Architecture, gpu: Gpu, count: int, goal: Goal, *, whole: bool = True
    ) -> None:
        self.arch, self.gpu, self.count, self.goal = arch, gpu, count, goal
        self.whole = whole
        """False: only what can be picked is wanted."""
        self.refused: list[Refusal] = []
        """Filled while the drafts are made."""

    def drafts(self) -> Iterator[Draft]:
        """All of them, a method after the other."""
        for method in self.goal.considered:
            lora = None if method == "full" else self._lora()
            for world in self._worlds():
                for zero in self._zeros(method, world):
                    yield from self._of(method, lora, world, zero)

    def _of(
        self, method: str, lora: LoRA | None, world: int, zero: DeepSpeed | None
    ) -> Iterator[Draft]:
        """The product of the fields that remain."""
        fields = (
            self._pinned("quantization", _quantized(method)),
            self._pinned("double_quant", _double_quant(method)),
            self._pinned("dtype", self._dtypes(method, zero)),
            self._pinned("mixed_precision", self._mixed()),
            self._pinned("attention", self._attentions()),
            self._pinned("gradient_checkpointing", (Choice(False), Choice(True))),
            self._pinned("allocator", _ALLOCATORS),
        )
        batches = self._batches(world)
        optimizers = self._pinned("optimizer", self._optimizers(zero))
        for chosen in product(*fields):
            marked = [choice for choice in chosen if choice.verdict]
            # What changes the result says more than what only costs.
            marked.sort(key=lambda choice: choice.verdict == NO_BETTER)
            common = dict(zip(_FIELDS, (choice.value for choice in chosen), strict=True))
            common |= {"lora": lora, "deepspeed": zero, "world_size": world}
            for optimizer in optimizers:
                first = marked[0] if marked else optimizer
                for batch, steps in batches:
                    recipe = self._legal(method, common, optimizer.value, batch, steps)
                    if recipe is None:
                        break  # whatever the batch
                    yield Draft(method, recipe, first.verdict, first.why)

    def _legal(
        self, method: str, common: dict[str, Any], optimizer: str, batch: int, steps: int
    ) -> Recipe | None:
        """The recipe; None where the libraries refuse it."""
        try:
            recipe = Recipe(
                **common,
                optimizer=optimizer,
                batch_size=batch,
                gradient_accumulation_steps=steps,
                seq_len=self.goal.seq_len,
            )
        except UserError as error:
            reason: str | None = str(error)
        else:
            reason = self._beyond_the_card(recipe.attention) or _refused(
                self.arch, recipe.lora, recipe.attention, recipe.seq_len
            )
            if reason is None:
                return recipe
        if not any(known.reason == reason for known in self.refused):
            self.refused.append(Refusal(method, str(reason)))
        return None

    def _beyond_the_card(self, attention: str) -> str | None:
        """Why no kernel runs it there; None: one does."""
        if attention != "flash_attention_2" or self.gpu.supports_flash_attention_2:
            return None
        return warnings_for(self.gpu, uses_bf16=False, attention=attention)[0]

    def _pinned(self, name: str, choices: Sequence[Choice]) -> Sequence[Choice]:
        """What is pinned, or all of `choices`."""
        if name in self.goal.pins:
            return [Choice(self.goal.pins[name])]
        return choices if self.whole else [choice for choice in choices if not choice.verdict]

    # -- fields -----------------------------------------------------------------------------
    def _lora(self) -> LoRA:
        given = self.goal.lora
        if isinstance(given, LoRA):
            return given
        return replace(default_lora(self.arch), **(given or {}))

    def deals(self) -> bool:
        """Whether the effective batch can be dealt out at all."""
        return any(self._batches(world) for world in self._worlds())

    def _worlds(self) -> list[int]:
        """Numbers of cards that the effective batch can be dealt to."""
        pins = self.goal.pins
        if "world_size" in pins:
            return [pins["world_size"]]
        if "deepspeed" not in pins and "batch_size" not in pins:
            return [n for n in range(1, self.count + 1) if self.goal.effective_batch % n == 0]
        return [n for n in range(1, self.count + 1) if self._batches(n)]

    def _batches(self, world: int) -> list[tuple[int, int]]:
        """(micro-batch, accumulation) that make the effective batch on `world` cards."""
        each, rest = divmod(self.goal.effective_batch, world)
        if rest:
            return []
        pins = self.goal.pins
        pairs = [(n, each // n) for n in range(1, each + 1) if each % n == 0]
        return [
            (batch, steps)
            for batch, steps in pairs
            if pins.get("batch_size", batch) == batch
            and pins.get("gradient_accumulation_steps", steps) == steps
        ]

    def _dtypes(self, method: str, zero: DeepSpeed | None) -> Sequence[Choice]:
        half = self._half
        if zero is not None:
            return (Choice(half), Choice("fp32", NO_BETTER, "DeepSpeed casts it to 16 bits"))
        if method != "full":
            why = "frozen weights gain nothing in fp32: they were published in 16 bits"
            return (Choice(half), Choice("fp32", NO_BETTER, why))
        return (Choice(half), Choice("fp32"))

    def _mixed(self) -> Sequence[Choice]:
        why = "without autocast: 16-bit weights lose its fp32 softmax, norms and loss, and fp32 "
        why += "ones the tensor cores"
        return (Choice(self._half), Choice("no", LOWER, why))

    @property
    def _half(self) -> str:
        """The 16-bit type that the card computes in."""
        return "bf16" if self.gpu.supports_bf16 else "fp16"

    def _attentions(self) -> Sequence[Choice]:
        family = self.arch.family
        found = []
        if family in WITHOUT_SDPA:
            found.append(Choice("eager"))
        else:
            why = "sdpa needs no more memory and no more time"
            found += [Choice("sdpa"), Choice("eager", NO_BETTER, why)]
        if self.gpu.supports_flash_attention_2 and family not in WITHOUT_FLASH_ATTENTION_2:
            here = _has_flash_attention()
            why = "needs the package flash-attn; --attention flash_attention_2 plans with it"
            found.append(Choice("flash_attention_2", *(() if here else (MISSING, why))))
        return found

    def _optimizers(self, zero: DeepSpeed | None) -> Sequence[Choice]:
        """Those of AdamW: another algorithm learns something else."""
        if zero is not None:
            why = "DeepSpeed takes its own AdamW for either"
            return (Choice("adamw_torch_fused"), Choice("adamw_torch", NO_BETTER, why))
        why = "adamw_torch_fused keeps the same states but for its step counts (512 bytes a tensor)"
        why += ", and makes no temporaries"
        found = [
            Choice("adamw_torch_fused"),
            Choice("adamw_torch", NO_BETTER, why),
            Choice("paged_adamw_32bit"),
        ]
        if self.goal.allow_8bit_optim:
            found += [Choice("adamw_8bit"), Choice("paged_adamw_8bit")]
        return found

    def _zeros(self, method: str, world: int) -> list[DeepSpeed | None]:
        pins = self.goal.pins
        if "deepspeed" in pins:
            return [pins["deepspeed"]]
        if not any(name in pins for name in ZERO_PINS):
            kinds = _ZERO_ALONE if world == 1 else _ZERO
            return [None, *(_zero(*kind) for kind in kinds[method])]
        return list(self._pinned_zeros())

    def _pinned_zeros(self) -> Iterator[DeepSpeed | None]:
        """All that agree with what is pinned of ZeRO."""
        pins = self.goal.pins
        offloads = [pins.get(name) for name in ZERO_PINS[1:]]
        if pins.get("zero") is None and not any(offloads):
            yield None
        if "zero" in pins and pins["zero"] is None:
            return
        stages = (pins["zero"],) if "zero" in pins else (1, 2, 3)
        optimizers = _either(pins, "offload_optimizer")
        weights = _either(pins, "offload_param")
        for stage, optimizer, param in product(stages, optimizers, weights):
            try:
                yield _zero(stage, optimizer, param, pins.get("nvme_path"))
            except UserError:
                continue


_FIELDS = (
    "quantization",
    "double_quant",
    "dtype",
    "mixed_precision",
    "attention",
    "gradient_checkpointing",
    "allocator",
)
_ALLOCATORS = (
    Choice("expandable_segments"),
    Choice("default", NO_BETTER, "expandable segments fragment less, and cost nothing"),
)
# (stage, offload_optimizer, offload_param) by method. On one card ZeRO partitions nothing: what it
# is good for is offloading. What adapters train is too small for its states to matter.
_ZERO_ALONE: dict[str, tuple[tuple[int, str | None, str | None], ...]] = {
    "full": ((2, "cpu", None), (3, "cpu", None), (3, "cpu", "cpu")),
    "lora": ((3, "cpu", "cpu"),),
    "int8": (),
    "qlora": (),
}
_ZERO: dict[str, tuple[tuple[int, str | None, str | None], ...]] = {
    "full": ((1, None, None), (2, None, None), (3, None, None), *_ZERO_ALONE["full"]),
    "lora": ((2, None, None), (3, None, None), (3, "cpu", "cpu")),
    "int8": ((2, None, None),),
    "qlora": ((2, None, None),),
}


def _quantized(method: str) -> Sequence[Choice]:
    first, *others = quantizations(method)
    why = "nf4 rounds normal weights with less error, in the same bytes and time"
    return [Choice(first), *(Choice(name, LOWER, why) for name in others)]


def _double_quant(method: str) -> Sequence[Choice]:
    return (Choice(True), Choice(False)) if method == "qlora" else (Choice(True),)


def _either(pins: Any, name: str) -> tuple[Any, ...]:
    return (pins[name],) if name in pins else (None, "cpu")


@cache
def _zero(stage: int, optimizer: Any, param: Any, nvme_path: str | None = None) -> DeepSpeed:
    return DeepSpeed(
        stage=stage, offload_optimizer=optimizer, offload_param=param, nvme_path=nvme_path
    )


@cache
def default_lora(arch: Architecture) -> LoRA:
    """Rank 16 on all linear layers; without dropout where experts are adapted: peft refuses it."""
    merged = any(t.former for t in inventory(arch))
    return LoRA(dropout=0.0) if merged else LoRA()


@cache
def _refused(arch: Architecture, lora: LoRA | None, attention: Any, seq_len: int) -> str | None:
    """Why this model can't be run so; None: it can."""
    if attention == "sdpa" and arch.family in WITHOUT_SDPA:
        return f"attention 'sdpa' with {arch.family}: transformers has none for it. Use 'eager'"
    try:
        check_model(arch, Recipe(lora=lora, attention=attention, seq_len=seq_len))
    except UnknownName:  # no combination to leave out, but a slip
        raise
    except UserError as error:
        return str(error)
    return None


@cache
def _has_flash_attention() -> bool:
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None
