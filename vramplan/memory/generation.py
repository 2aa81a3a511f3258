"""Recording `model.generate`: the prefill of a prompt, and one decoding step with a full cache.

A family's description runs once without gradients, keys and values going through a cache as they do
in transformers 5.17: generation/utils.py (_prefill, _sample), cache_utils.py (DynamicLayer,
DynamicSlidingWindowLayer). A decoding step has one token of every activation; what has the cache's
length are keys, values, and whatever is made of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from vramplan.memory import record
from vramplan.memory.precision import Policy
from vramplan.memory.program import POSITION, Program, reduce_recording
from vramplan.memory.record import Recorder, Recording
from vramplan.memory.tape import ITEMSIZE, Size, Value
from vramplan.models.architecture import Architecture
from vramplan.models.blocks import family

CACHE = "kv_cache"
BEFORE = "kv_cache before"
"""A cache tensor as the step finds it: a token shorter than what the step leaves."""


class Serving(Policy):
    """A policy without training: what quantization leaves alone keeps its dtype."""

    __slots__ = ()

    @property
    def weight_dtype(self) -> str:
        return self.dtype

    @property
    def trains_base(self) -> bool:
        return False


class Prefill(Recorder):
    """The whole prompt at once."""

    def __init__(self, policy: Policy, arch: Architecture) -> None:
        super().__init__(policy)
        self.grad_enabled = False
        self.arch = arch
        self.layer = 0
        self.cache: list[Value] = []
        self.position_tables = False

    def update(self, key: Value, value: Value) -> None:
        """Cache.update: the caller's key and value become the cache's, dense copies.

        A sliding layer keeps a view of its last tokens, so the whole prompt stays allocated until
        the next update makes a tensor of the window's length.
        """
        kept = [self.new(v.size, v.dtype, CACHE) for v in (key, value)]
        self.cache += kept
        _rebind((key, value), kept)

    def rotary_tables(self, *args: Any, **options: Any) -> tuple[Value, Value]:
        """generate passes positions of every sequence: tables of batch x sequence."""
        self.position_tables = True
        tables = super().rotary_tables(*args, **options)
        self.position_tables = False
        return tables

    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        if self.position_tables:
            size = size._replace(batch=1)
        return super().new(size, dtype, category)


class Decoding(Prefill):
    """One token; a size's tokens are the cache's only where the description has them twice.

    Sizes in the description count the tokens of queries by sequence^1, and what queries and keys
    make together by sequence^2; one query leaves sequence^1 of that. Cached keys are given
    sequence^2 likewise.
    """

    def __init__(self, policy: Policy, arch: Architecture, window: int | None) -> None:
        super().__init__(policy, arch)
        self.window = window  # tokens that a sliding layer was left with; None: all so far
        self.before: list[list[Value]] = []

    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        beyond = self.policy.beyond_window and slides(self.arch, self.layer)
        if size.seq < 2:
            stored = size._replace(seq=0)
        elif beyond:
            stored = Size(size.count * (self.arch.sliding_window or 1), size.batch, 0)
        else:
            stored = size._replace(seq=size.seq - 1)
        value = super().new(stored, dtype, category)
        value.size = size if not self.position_tables else size._replace(batch=1)
        return value

    def fill(self, dtype: str) -> None:
        """What earlier steps left, of every layer."""
        for i in range(self.arch.layers):
            window = self.window if slides(self.arch, i) else None
            layer = []
            for width in cache_widths(self.arch):
                size = Size(width, 1, 1) if window is None else Size(width * window, 1, 0)
                layer.append(Recorder.new(self, size, dtype, BEFORE if window is None else CACHE))
            self.before.append(layer)

    def update(self, key: Value, value: Value) -> None:
        """A full layer lets go of its old keys before it makes the new values."""
        before = self.before[self.layer]
        kept = []
        for v in (key, value):
            kept.append(self.new(Size(v.size.count, 1, 2), v.dtype, CACHE))
            if not slides(self.arch, self.layer):
                before.pop(0)
        before.clear()
        self.cache += kept
        _rebind((key, value), kept)

    def linear_4bit(self, x: Value, n_in: int, n_out: int, bias: Value | None) -> Value:
        """bitsandbytes matmul_4bit: a single row takes gemv_4bit, which dequantizes nothing."""
        if not self.policy.single_sequence:
            return super().linear_4bit(x, n_in, n_out, bias)
        return self.new(x.size.per(n_in).times(n_out), x.dtype)


class DecodingProgram(Program):
    """Evaluated with `seq` = tokens in the cache after the step.

    Which instant is highest is judged with as many tokens before as after, so the figure can be
    short of the true maximum by one token of one layer's keys.
    """

    __slots__ = ()

    def sizes(self, powers: Sequence[int]) -> list[int]:
        sizes = super().sizes(powers)
        batch, seq = powers[POSITION[1, 0]], powers[POSITION[0, 1]]
        for i, (count, *_, category) in enumerate(self.classes):
            if category == BEFORE:
                sizes[i] = -(-count * batch * (seq - 1) // 512) * 512
        return sizes


def slides(arch: Architecture, layer: int) -> bool:
    """Whether a layer's cache is a DynamicSlidingWindowLayer (get_layer_types_and_kwargs)."""
    if arch.sliding_window is None:
        return False
    return "sliding" in arch.layer_kinds[layer] if arch.layer_kinds else True


def cache_widths(arch: Architecture) -> tuple[int, int]:
    """Elements a token of a layer's two cache tensors: keys and values, or (MLA) the latents.

    modeling_deepseek_v2.py and _v3.py cache the compressed keys and values and the rotated key.
    """
    if arch.latent is not None:
        return arch.latent.key_value_rank, arch.latent.rope_head_dim
    width = arch.kv_heads * arch.head_dim
    return width, width


def cache_bytes(arch: Architecture, dtype: str, batch: int, tokens: int, *, decoded: bool) -> int:
    """Bytes of a DynamicCache that was fed `tokens`; `decoded`: not all of them at once."""
    total = 0
    for layer in range(arch.layers):
        kept = tokens
        if decoded and slides(arch, layer):
            kept = min(tokens, arch.sliding_window or tokens)
        total += sum(batch * kept * width * ITEMSIZE[dtype] for width in cache_widths(arch))
    return total


@lru_cache(maxsize=256)
def prefill_program(arch: Architecture, policy: Policy) -> Program:
    """The prompt's forward and the first token."""
    g = Prefill(policy, arch)
    return reduce_recording(_record(g, arch))


@lru_cache(maxsize=256)
def decoding_program(arch: Architecture, policy: Policy, window: int | None) -> DecodingProgram:
    """A later token's forward; `window`: tokens that a sliding layer's cache holds before it."""
    g = Decoding(policy, arch, window)
    program = reduce_recording(_record(g, arch))
    return DecodingProgram(program.sections, program.classes)


def _record(g: Prefill, arch: Architecture) -> Recording:
    model = family(arch.family)(arch, g)
    _hook(model, g)
    g.mark("forward", "cache")
    if isinstance(g, Decoding):
        g.fill(g.policy.dtype)
    g.mark("forward", "inputs")
    hidden = record._hidden_states(g, model)
    # logits_to_keep=1: the head sees the last token alone, through a view
    logits = model.head(hidden.alias(Size(hidden.size.count, 1, 0)))
    del hidden
    g.mark("forward", "next token")
    scores = g.new(logits.size, "fp32", "logits")
    g.mark("end", "end")
    events = g.events[: g.marks[-1].start]
    recording = Recording(
        tuple(g.marks), events, list(g.sizes), list(g.categories), len(g.epilogues)
    )
    del scores, logits
    return recording


def _hook(model: Any, g: Prefill) -> None:
    """Between projections and attention the model's attention calls the cache."""
    name = "expand_kv" if model.arch.latent is not None else "attend"
    run, use = model.run, getattr(model, name)

    def noted(x: Value, layer: int, tables: Any) -> Value:
        g.layer = layer
        result: Value = run(x, layer, tables)
        return result

    def cached(*args: Any) -> Any:
        key, value = args[:2] if name == "expand_kv" else args[1:3]
        g.update(key, value)
        del key, value
        return use(*args)

    model.run = noted
    setattr(model, name, cached)


def _rebind(given: Sequence[Value], kept: Sequence[Value]) -> None:
    """`key, value = cache.update(key, value)`: the caller's variables mean other tensors now."""
    for v, k in zip(given, kept, strict=True):
        v.storage, v.size, v.strided = k.storage, k.size, False
