"""Recording `model.generate`: the prefill of a prompt, and one decoding step with a full cache.

A family's description runs once without gradients, keys and values going through a cache as they do
in transformers 5.17: generation/utils.py (_prefill, _sample), cache_utils.py (DynamicLayer,
DynamicSlidingWindowLayer). A decoding step has one token of every activation; what has the cache's
length are keys, values, and whatever is made of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from vramplan.memory.precision import Policy
from vramplan.memory.program import POSITION, Program, reduce_recording
from vramplan.memory.record import Recorder, Recording, hidden_states
from vramplan.memory.sinks import Pair
from vramplan.memory.values import ITEMSIZE, Size, Value
from vramplan.models.architecture import Architecture
from vramplan.models.blocks import family
from vramplan.models.stack import Stack

CACHE = "kv_cache"
BEFORE = "kv_cache before"
"""A cache tensor as the step finds it: a token shorter than what the step leaves."""
ATTENTION = ("attend", "attend_weights", "eager_weights", "fused", "probabilities")
"""Methods of descriptions that take queries, keys and values: before the first of them to run in a
layer its model's attention calls Cache.update."""


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
        self.layer = -1  # outside the layers
        self.cache: list[Value] = []
        self.updated = True  # the layer that runs has called Cache.update
        self.fused_heads: list[Value] = []  # BLOOM's queries, keys and values until then
        self.batched = False  # what is made has a row for every sequence

    def enter(self, layer: int) -> None:
        """A layer begins."""
        self.layer, self.updated = layer, False

    def update_once(self, key: Value, value: Value) -> None:
        """Cache.update where the layer has not called it yet."""
        if not self.updated:
            self.updated = True
            self.fused_heads.clear()
            self.update(key, value)

    def update(self, key: Value, value: Value) -> None:
        """Cache.update: the caller's key and value become the cache's, dense copies.

        A sliding layer keeps a view of its last tokens, so the whole prompt stays allocated until
        the next update makes a tensor of the window's length.
        """
        kept = [self.new(v.size, v.dtype, CACHE) for v in (key, value)]
        self.cache += kept
        _rebind((key, value), kept)

    def select_heads(self, x: Value) -> Value:
        """BLOOM updates the cache with what the fused projection is taken apart into."""
        out = super().select_heads(x)
        if self.arch.family == "bloom":
            self.fused_heads.append(out)
            if len(self.fused_heads) == 3:
                self.update_once(*self.fused_heads[1:])
        return out

    def fused_attention(self, q: Value, k: Value, v: Value, *args: Any, **options: Any) -> Value:
        self.update_once(k, v)
        return super().fused_attention(q, k, v, *args, **options)

    def grown(self) -> Value:
        """An input as long as the sequence so far."""
        return self.new(Size(1, 1, 1), "int64")

    def minus_maximum(self, x: Value, heads: int) -> Value:
        """x - x.max(...).values: without gradients nothing keeps the indices."""
        maxima, indices = self.new(Size(heads, 1, 1), x.dtype), self.new(Size(heads, 1, 1), "int64")
        del indices
        out = self.new_wide(heads, x.dtype)
        del maxima
        return out

    # -- latent attention: keys are as many as the cache has, not as there are queries -----------
    def assemble(self, nope: Value, rope: Value) -> Value:
        size = nope.size._replace(numel=nope.size.numel + rope.size.numel)
        return self.new(size, nope.dtype)

    def padded_flash(self, q: Value, k: Value, v: Value, heads: int, dim: int, value: int) -> Value:
        v = self.new(v.size._replace(numel=heads * dim), v.dtype)
        out = self.flash(q, k, v, heads, heads, dim)
        return self.clone(self.slice(out, value, dim))

    # -- positions: generate passes those of every sequence, so their tables have its batch ------
    @contextmanager
    def every_sequence(self) -> Iterator[None]:
        self.batched = True
        yield
        self.batched = False

    def rotary_tables(self, *args: Any, **options: Any) -> tuple[Value, Value]:
        with self.every_sequence():
            return super().rotary_tables(*args, **options)

    def half_tables(self, *args: Any, **options: Any) -> tuple[Value, Value]:
        with self.every_sequence():
            return super().half_tables(*args, **options)

    def frequencies(self, width: int) -> Value:
        with self.every_sequence():
            return super().frequencies(width)

    def table(self, *args: Any, **options: Any) -> Value:
        with self.every_sequence():
            return super().table(*args, **options)

    def position_ids(self, batched: bool = False) -> Value:
        """An input, counted with them."""
        return Value(self, None, Size(1, 1, 1), "int64")

    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        if self.batched:
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
        self.masks_window = False
        self.before: list[list[Value]] = []

    @property
    def windowed(self) -> bool:
        """Whether what has the cache's length has the window's."""
        sliding = self.layer >= 0 and slides(self.arch, self.layer)
        return self.policy.beyond_window and (sliding or self.masks_window)

    def sliding_mask(self, x: Value) -> Value | None:
        self.masks_window = True
        mask = super().sliding_mask(x)
        self.masks_window = False
        return mask

    def stored(self, size: Size) -> Size:
        """What is really allocated for a size of the description."""
        if size.seq < 2:
            return size._replace(seq=0)
        if self.windowed:
            return Size(size.numel * (self.arch.sliding_window or 1), size.batch, 0)
        return size._replace(seq=size.seq - 1)

    def new(self, size: Size, dtype: str, category: str | None = None) -> Value:
        value = super().new(self.stored(size), dtype, category)
        value.size = size if not self.batched else size._replace(batch=1)
        return value

    def new_wide(self, heads: int, dtype: str) -> Value:
        size = Size(heads, 1, 2)
        column = self.new(Size(heads, 1, 1), dtype)
        pair = Pair(self, len(self.sizes), column.storage)
        stored = self.stored(size)
        self.sizes.append((stored.numel * ITEMSIZE[dtype], stored.batch, stored.seq))
        self.categories.append(self.category)
        return Value(self, pair, size, dtype)

    def grown(self) -> Value:
        self.layer = -1
        return self.new(Size(1, 1, 2), "int64")

    def alibi(self, heads: int, dtype: str) -> Value:
        """The padding mask, of which positions are made, has a column for every cached token."""
        positions = self.new(Size(1, 1, 2), "int64")
        biases = self.new(Size(heads, 1, 2), "fp32")
        del positions
        return self.to(biases, dtype)

    def grouped_forward(
        self,
        x: Value,
        index: Value,
        scores: Value,
        stack: Stack,
        gate: Callable[[Value], Value],
        weight: Callable[[str], Value],
    ) -> Value:
        """integrations/moe.py batched_mm_experts_forward.

        generation/utils.py _optimize_model_for_decode: on a GPU every step after the prompt takes
        it in place of grouped_mm, however many tokens there are. It copies the weights of the
        experts that each token visits; those of gate_up_proj live until down_proj's are copied.
        """
        active, hidden, width = stack.active, stack.hidden, stack.width
        rows = Size(active, 1, 1)
        selected = self.new(rows.times(hidden), x.dtype)
        expert_ids = self.constant(rows, "int64")
        weights = self.take(weight("gate_up_proj"), expert_ids, rows.times(2 * width * hidden))
        bias = self.expert_bias(stack, "gate_up_proj", expert_ids, rows)
        out = self.new(rows.times(2 * width), weights.dtype)
        out = gate(out)
        weights = self.take(weight("down_proj"), expert_ids, rows.times(width * hidden))
        bias = self.expert_bias(stack, "down_proj", expert_ids, rows)
        out = self.new(rows.times(hidden), weights.dtype)
        weighted = out * scores.alias(rows)
        final = self.mix(weighted, active)
        del selected, bias
        return self.to(final, x.dtype)

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
            kept.append(self.new(Size(v.size.numel, 1, 2), v.dtype, CACHE))
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

    modeling_deepseek_v2.py and _v3.py cache the compressed keys and values and the rotated key;
    modeling_falcon.py's new decoder (40b) caches a group's key once for each of its queries.
    """
    if arch.latent is not None:
        return arch.latent.key_value_rank, arch.latent.rope_head_dim
    repeated = arch.family == "falcon" and arch.figure("grouped")
    width = (arch.heads if repeated else arch.kv_heads) * arch.head_dim
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
    before = None
    if isinstance(g, Decoding):
        g.fill(g.policy.dtype)
        before = g.new(Size(arch.vocab_size, 1, 0), "fp32", "logits")  # next_token_logits
    g.mark("forward", "inputs")
    hidden = hidden_states(g, model)
    # logits_to_keep=1: the head sees the last token alone, through a view
    logits = model.head(hidden.alias(Size(hidden.size.numel, 1, 0)))
    del hidden
    g.mark("forward", "next token")
    # _update_model_kwargs_for_generation: a mask and positions with the new token, beside the old
    grown = None if arch.family == "bloom" and before is None else g.grown()
    scores = g.new(logits.size, "fp32", "logits")
    recording = g.recording()
    del scores, logits, before, grown
    return recording


def _hook(model: Any, g: Prefill) -> None:
    """Between projections and attention the model's attention calls the cache."""
    run = model.run

    def noted(x: Value, layer: int, tables: Any) -> Value:
        g.enter(layer)
        result: Value = run(x, layer, tables)
        return result

    model.run = noted
    if model.arch.latent is not None:
        model.expand_kv = _cached(model.expand_kv, g, 0)
    for name in ATTENTION:
        if hasattr(model, name):
            setattr(model, name, _cached(getattr(model, name), g, 1))


def _cached(use: Callable[..., Any], g: Prefill, first: int) -> Callable[..., Any]:
    """`use`, whose arguments `first` and the next are keys and values, from the cache."""

    def cached(*args: Any) -> Any:
        g.update_once(*args[first : first + 2])
        return use(*args)

    return cached


def _rebind(given: Sequence[Value], kept: Sequence[Value]) -> None:
    """`key, value = cache.update(key, value)`: the caller's variables mean other tensors now."""
    for v, k in zip(given, kept, strict=True):
        v.storage, v.size, v.strided = k.storage, k.size, False
