"""Every parameter of a model: name, shape, role. Its description is run for names only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vramplan.models.architecture import Architecture
from vramplan.models.blocks import family

if TYPE_CHECKING:
    from vramplan.models.stack import Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A parameter or buffer, or as many equal ones as there are layers of its kind."""

    name: str
    """As in the state dict; `{layer}` where one stands in each of `layers`."""
    shape: tuple[int, ...]
    role: str
    """embedding | linear | head | norm | bias | expert | router | buffer | other"""
    layers: tuple[int, ...] = ()
    quantizable: bool = False
    """A weight that transformers replaces by bitsandbytes' under quantization."""
    adaptable: bool = False
    """A linear's weight that peft's all-linear adapts."""
    transposed: bool = False
    """A Conv1D's weight: in x out, not out x in."""
    former: tuple[str, ...] = ()
    """Modules of transformers 4 that a parameter of a mixture of experts holds: targets that name
    all of them (all-linear names everything) adapt it, with their number times the rank for each
    expert: lora_A is (number x rank x experts) x in, lora_B out x the same."""
    dtype: str | None = None
    """The dtype that it keeps whatever the model is loaded in; None: the model's."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def count(self) -> int:
        return len(self.layers) or 1

    def names(self) -> Iterator[str]:
        if not self.layers:
            yield self.name
        for layer in self.layers:
            yield self.name.replace("{layer}", str(layer))


class Blank:
    """The value of every op while only names are wanted."""

    dtype = "fp32"

    def __getattr__(self, name: str) -> Any:
        if name == "tape":
            return _BLANK_TAPE
        return lambda *args, **kwargs: self

    def split(self, parts: Sequence[int]) -> tuple[Blank, ...]:
        return tuple(self for _ in parts)

    def _itself(self, *args: Any) -> Blank:
        return self

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __truediv__ = __neg__ = _itself


BLANK = Blank()


class Inventory:
    """A builder that notes parameters and computes nothing."""

    def __init__(self) -> None:
        self.policy = SimpleNamespace(
            attention="sdpa",
            quantization=None,
            rank=None,
            autocast=None,
            checkpointing=False,
            beyond_window=False,
        )
        self.found: dict[str, Tensor] = {}
        self.layers: tuple[int, ...] = ()
        self.marker = ""

    def note(self, name: str, shape: tuple[int, ...], role: str, **facts: Any) -> Blank:
        if self.marker:
            name = name.replace(self.marker, self.marker.rpartition(".")[0] + ".{layer}", 1)
        key = f"{name}@{self.layers[0]}" if self.layers else name
        if key not in self.found:
            self.found[key] = Tensor(name=name, shape=shape, role=role, layers=self.layers, **facts)
        return BLANK

    def parameter(self, name: str, *shape: int, trains: bool | None = None) -> Blank:
        return self.note(name, shape, _role(name))

    def embedding(self, name: str, rows: int, width: int, indices: Any = None) -> Blank:
        return self.note(f"{name}.weight", (rows, width), "embedding")

    def head(self, x: Blank, name: str, n_in: int, n_out: int, bias: str | bool) -> Blank:
        self.note(name, (n_out, n_in), "head")
        return self.note(bias, (n_out,), "bias") if isinstance(bias, str) else BLANK

    def linear(
        self,
        x: Blank,
        name: str,
        n_in: int,
        n_out: int,
        bias: bool = False,
        quantizable: bool = True,
        adaptable: bool = True,
        transposed: bool = False,
        product: bool = False,
    ) -> Blank:
        shape = (n_in, n_out) if transposed else (n_out, n_in)
        facts = {"quantizable": quantizable, "adaptable": adaptable, "transposed": transposed}
        self.note(f"{name}.weight", shape, "linear", **facts)
        return self.note(f"{name}.bias", (n_out,), "bias") if bias else BLANK

    def experts(self, x: Blank, index: Blank, scores: Blank, stack: Stack, gate: Any) -> Blank:
        for part, shape in stack.shapes.items():
            self.note(f"{stack.name}.{part}", shape, "expert", former=stack.former[part])
            if stack.biased:
                bias = (stack.count, stack.outputs[part])
                self.note(f"{stack.name}.{part}_bias", bias, "expert")
        return BLANK

    def router_logits(
        self,
        x: Blank,
        name: str,
        experts: int,
        hidden: int,
        former: tuple[str, ...],
        wide: bool = False,
        biased: bool = False,
    ) -> Blank:
        self.note(f"{name}.weight", (experts, hidden), "router", former=former)
        return self.note(f"{name}.bias", (experts,), "bias") if biased else BLANK

    def topk(self, x: Blank, k: int, width: int) -> tuple[Blank, Blank]:
        return BLANK, BLANK

    def half_tables(self, x: Blank, width: int) -> tuple[Blank, Blank]:
        return BLANK, BLANK

    def buffer(self, name: str, numel: int, dtype: str = "fp32") -> None:
        self.note(name, (numel,), "buffer", dtype=dtype)

    def rotary_tables(self, x: Blank, width: int, cast: bool = True) -> tuple[Blank, Blank]:
        return BLANK, BLANK

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: BLANK


_BLANK_TAPE: Any = Inventory()


def _role(name: str) -> str:
    if name.endswith(".bias"):
        return "bias"
    return "norm" if "norm" in name.lower() or ".ln" in name else "other"


@lru_cache(maxsize=256)
def inventory(arch: Architecture) -> tuple[Tensor, ...]:
    """All parameters and buffers of `arch`; tied weights once."""
    g = Inventory()
    model = family(arch.family)(arch, g)
    x = model.embed()
    tables = model.prepare(x)
    kinds: dict[str, list[int]] = {}
    for layer in range(arch.layers):
        kinds.setdefault(model.kind(layer), []).append(layer)
    for layers in kinds.values():
        g.layers, g.marker = tuple(layers), f"{model.layers_name}.{layers[0]}"
        model.run(x, layers[0], model.tables_for(layers[0], tables))
    g.layers, g.marker = (), ""
    model.head(model.final_norm(x))
    model.buffers()
    return _as_declared(tuple(g.found.values()), model.declared_first)


def _as_declared(found: tuple[Tensor, ...], first: Mapping[str, str]) -> tuple[Tensor, ...]:
    """In the order of model.parameters(): modules that `first` names stand before its other ones,
    though their forward comes later."""
    out = list(found)
    for early, late in first.items():
        for tensor in found:
            prefix, part, ending = tensor.name.partition(early)
            others = [k for k, t in enumerate(out) if t.name == f"{prefix}{late}{ending}"]
            if part and others:
                out.remove(tensor)
                out.insert(others[0], tensor)
    return tuple(out)


def parameter_count(arch: Architecture) -> int:
    """Number of parameters, tied weights once; buffers are none."""
    return sum(t.numel * t.count for t in inventory(arch) if t.role != "buffer")
