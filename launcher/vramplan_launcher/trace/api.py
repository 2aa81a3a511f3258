"""`trace_model`: what `vramplan.estimate` answers, from a trace. Importing this needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.errors import IllegalRecipe, UserError
from vramplan.hardware.catalogue import Gpu, Gpus, parse_gpu, warnings_for
from vramplan.memory import allocator
from vramplan.memory.estimate import CATEGORIES
from vramplan.memory.needs import Needs, document
from vramplan.memory.timeline import Phase
from vramplan.recipe.optimizers import LIBRARIES as OF_OPTIMIZERS
from vramplan.recipe.optimizers import find_optimizer
from vramplan.recipe.recipe import Recipe
from vramplan.recipe.rules import cautions
from vramplan_launcher.trace import cache

if TYPE_CHECKING:
    from vramplan.models.locate import Located
    from vramplan_launcher.trace.scaling import Deep

INSTALL = "pip install 'vramplan[launch]'"
PHASES = ("load", "prepare", "forward", "backward", "optimizer_step")


@dataclass(frozen=True, kw_only=True)
class Times:
    """The phases of a steady step; their peaks are over all steps."""

    all: Mapping[str, Phase]

    def phases(self) -> Mapping[str, Phase]:
        return self.all


@dataclass(frozen=True, kw_only=True)
class Traced(Needs):
    """A trace in the shape of an `Estimate`. Sizes are bytes on one GPU."""

    id: str
    recipe: Recipe
    parameters: int
    trainable_parameters: int
    timeline: Times
    breakdown: Mapping[str, int]
    """Bytes by category at the peak; they add up to `peak_allocated`."""
    managed: int
    """Optimizer states in CUDA managed memory (paged optimizers)."""
    workspace: int
    versions: Mapping[str, str]
    """Of the libraries whose code was traced."""
    gpu: Gpus | None = None
    notes: tuple[str, ...] = ()
    sharded: None = None
    """One rank is traced; ZeRO is not."""
    host: None = None

    @property
    def peak_allocated(self) -> int:
        """What torch.cuda.max_memory_allocated will say."""
        return max(phase.peak for phase in self.timeline.all.values())

    @property
    def peak_phase(self) -> str:
        """The first phase that reaches the peak."""
        peak = self.peak_allocated
        return next(name for name, p in self.timeline.all.items() if p.peak == peak)

    @property
    def overhead(self) -> dict[str, int]:
        """What the device holds beyond `peak_allocated`."""
        return {
            "context": allocator.context(self.recipe.quantization),
            "nccl": 0,
            "allocator_slack": allocator.slack(self.peak_allocated, self.recipe.allocator),
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """What of the recipe and the card costs memory or may surprise."""
        out = list(cautions(self.recipe))
        if self.gpu is not None:
            uses_bf16 = "bf16" in (self.recipe.dtype, self.recipe.mixed_precision)
            out += warnings_for(self.gpu.gpu, uses_bf16=uses_bf16, attention=self.recipe.attention)
        return tuple(out)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the keys of `Estimate.to_dict()`, and `via` and `versions`."""
        return {**document(self), "via": "trace", "versions": dict(self.versions)}


class NotInstalled(UserError):
    """The trace runs libraries that are not here."""


def missing(recipe: Recipe) -> tuple[str, ...]:
    """The packages that a trace of `recipe` runs and that are not installed; imports none."""
    needed = ["torch", "transformers", "accelerate"]
    if recipe.lora is not None:
        needed.append("peft")
    if recipe.quantization or find_optimizer(recipe.optimizer).package == "bitsandbytes":
        needed.append("bitsandbytes")
    return tuple(name for name in needed if importlib.util.find_spec(name) is None)


def check_installed(recipe: Recipe) -> None:
    """Raises NotInstalled, with the line that installs what a trace of `recipe` needs.

    IllegalRecipe for optimizers of other packages: compiled and Triton kernels, and steps that
    move tensors to the host, do on fake tensors what they don't do on a GPU.
    """
    package = find_optimizer(recipe.optimizer).package
    if package not in OF_OPTIMIZERS:
        raise IllegalRecipe(
            f"optimizer {recipe.optimizer!r} in a trace: {package}'s steps can't be traced. Use an "
            "estimate by rules, or an optimizer of torch, transformers or bitsandbytes"
        )
    lacking = missing(recipe)
    if lacking:
        raise NotInstalled(
            f"a trace runs the libraries' own code, and {' and '.join(lacking)} "
            f"{'is' if len(lacking) == 1 else 'are'} not installed: {INSTALL}"
        )


def trace_model(
    model: Any,
    recipe: Recipe = Recipe(),  # noqa: B008
    gpu: str | Gpu | Gpus | None = None,
    *,
    offline: bool | None = None,
    trust_remote_code: bool = False,
    use_cache: bool = True,
) -> Traced:
    """Trace the fine-tuning of `model` by `recipe`, or take the trace that was made before.

    `model`: as for `vramplan.estimate`. `trust_remote_code`: run a local folder's Python files.

    Raises UserError for what is wrong with the input, NotInstalled where a trace must be made and
    torch, transformers or another library that it runs is not there.
    """
    from vramplan.models.locate import locate

    located = locate(model, offline=offline)
    code = own_code(located, trust_remote_code)
    card = (
        parse_gpu(gpu) if isinstance(gpu, str) else Gpus(gpu=gpu) if isinstance(gpu, Gpu) else gpu
    )
    capability = capability_of(card)
    key = cache.key(located.config, recipe, capability, code)
    held = cache.read(key) if use_cache else None
    if held is None:
        held = _facts(run(located.config, recipe, capability, code))
        cache.write(key, held)
    return replace(_traced(held, located.id, recipe, card), notes=_notes(held, located))


def own_code(located: Located, trusted: bool) -> str | None:
    """The folder whose own Python a trace runs; None: the model needs none.

    Raises UserError where it needs some, and is not trusted or not local.
    """
    if not located.config.get("auto_map") or _known(located.config):
        return None
    if not trusted:
        raise UserError(
            f"{located.id} has model code of its own (auto_map in its config.json): look at its "
            "Python files, and pass --trust-remote-code to run them"
        )
    if located.path is None or not any(Path(located.path).parent.glob("*.py")):
        raise UserError(
            f"the code of {located.id} is not here: `hf download {located.id} --include '*.py' "
            "'*.json' --local-dir FOLDER`, then trace that folder"
        )
    return str(Path(located.path).parent)


def _known(config: Mapping[str, Any]) -> bool:
    """Whether vramplan describes the architecture: then transformers has code for it too."""
    from vramplan.models.hf_config import READERS

    return config.get("model_type") in READERS


def capability_of(card: Gpus | None) -> str:
    """The card's compute capability; of an unknown card, a Hopper's."""
    known = card is not None and not card.nominal and card.gpu.compute_capability
    return known or "9.0"


def run(
    config: Mapping[str, Any], recipe: Recipe, capability: str = "9.0", code: str | None = None
) -> Deep:
    """The trace itself, of many equal layers only a few.

    Raises UserError for what transformers or peft refuse, and where an architecture that vramplan
    does not describe can't be run on fake tensors.
    """
    check_installed(recipe)
    from vramplan_launcher.trace.naming import silent
    from vramplan_launcher.trace.scaling import run_deep

    kind = config.get("model_type")
    own = deepcopy(dict(config))  # transformers rewrites tables in place (rope_scaling)
    try:
        with silent():
            return run_deep(own, recipe, compute_capability=capability, code=code)
    except UserError:
        raise
    except Exception as error:
        refused = isinstance(error, (ValueError, ImportError, NotImplementedError))
        if _known(config) and not refused:
            raise  # a bug of the trace
        reason = str(error).strip().partition("\n")[0]
        what = "the libraries refuse this run of" if refused else "no trace could be made of"
        raise UserError(f"{what} {kind!r}: {type(error).__name__}: {reason}") from error


def traced(deep: Deep, name: str, recipe: Recipe, card: Gpus | None = None) -> Traced:
    """A trace in the shape of an estimate."""
    return _traced(_facts(deep), name, recipe, card)


def _traced(held: dict[str, Any], name: str, recipe: Recipe, card: Gpus | None) -> Traced:
    """From plain data, as it lies in the cache."""
    return Traced(
        id=name,
        recipe=recipe,
        parameters=held["parameters"],
        trainable_parameters=held["trainable_parameters"],
        timeline=Times(all={n: Phase(*held["phases"][n]) for n in PHASES}),
        breakdown=held["breakdown"],
        managed=held["managed"],
        workspace=held["workspace"],
        versions=held["versions"],
        gpu=card,
    )


def _facts(deep: Deep) -> dict[str, Any]:
    """What is kept of a trace: plain data."""
    from vramplan_launcher.trace.categories import live_by_category

    phases: dict[str, tuple[int, int]] = {}
    highest = max(range(len(deep.trace.phases)), key=lambda i: deep.trace.phases[i].peak)
    for phase in deep.trace.phases:
        name = phase.name.partition(":")[2]
        name = {"clip": "optimizer_step", "step_end": ""}.get(name, name)
        if name:
            _, peak = phases.get(name, (0, 0))
            phases[name] = (phase.end, max(peak, phase.peak))
    live = live_by_category(deep, highest)
    breakdown = {category: live.pop(category, 0) for category in CATEGORIES}
    breakdown["temporary"] += sum(live.values())
    counter = deep.large.counter
    return {
        "parameters": deep.trace.base_parameters,
        "trainable_parameters": deep.trace.trainable_parameters,
        "phases": phases,
        "breakdown": breakdown,
        "managed": deep.trace.managed,
        "workspace": sum(s.size for s in counter.storages.values() if s.category == "workspace"),
        "versions": cache.versions(),
    }


def _notes(held: Mapping[str, Any], located: Located) -> tuple[str, ...]:
    libraries = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    said = [f"Traced, not estimated: the code of {libraries} ran on fake tensors"]
    return tuple([*said, located.note] if located.note else said)
