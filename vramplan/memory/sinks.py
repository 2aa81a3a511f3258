"""Eager attention with sinks (gpt-oss): one learned logit a head beside those of the keys.

Source: transformers 5.17 models/gpt_oss/modeling_gpt_oss.py eager_attention_forward. Scores are
sequence x (sequence + 1) there, which is no monomial: such a tensor is counted as two allocations
that are born and die together.
"""

from __future__ import annotations

from vramplan.memory.graph import Graph
from vramplan.memory.ops import promote
from vramplan.memory.tape import Tape
from vramplan.memory.values import ITEMSIZE, Size, Storage, Value


class Pair(Storage):
    """A storage and a second one that it keeps."""

    __slots__ = ("other",)

    def __init__(self, tape: Tape, index: int, other: Storage | None) -> None:
        super().__init__(tape, index)
        self.other = other


class Sinks(Graph):
    """What sinks add to the ops."""

    def new_wide(self, heads: int, dtype: str) -> Value:
        """batch x heads x sequence x (sequence + 1)"""
        column = self.new(Size(heads, 1, 1), dtype)
        size = Size(heads, 1, 2)
        pair = Pair(self, len(self.sizes), column.storage)
        self.sizes.append((heads * ITEMSIZE[dtype], 1, 2))
        self.categories.append(self.category)
        return Value(self, pair, size, dtype)

    def with_sinks(self, weights: Value, sinks: Value, heads: int) -> Value:
        """cat([weights, sinks]): gradients are a view of the incoming one, and its sum."""
        dtype, size = promote(weights.dtype, sinks.dtype), weights.size

        def backward(grad: Value) -> tuple[Value, Value]:
            part = Value(self, grad.storage, size, grad.dtype, view=True)
            return part, self.new(Size(heads), grad.dtype)

        return self.record(
            (weights, sinks), lambda: (), lambda: self.new_wide(heads, dtype), backward
        )

    def minus_maximum(self, x: Value, heads: int) -> Value:
        """x - x.max(): saves the maxima's indices.

        Backward negates the gradient and sums it for the maxima, whose own gradient is spread
        into zeros and added to the rest in place.
        """
        dtype = x.dtype
        rows = Size(heads, 1, 1)
        indices: list[Value] = []

        def compute() -> Value:
            maxima = self.new(rows, dtype)
            indices.append(self.new(rows, "int64"))
            out = self.new_wide(heads, dtype)
            del maxima
            return out

        def backward(grad: Value) -> Value:
            negative = self.new_wide(heads, dtype)
            total = self.new(rows, dtype)
            del negative
            zeros = self.new_wide(heads, dtype)
            del total, zeros
            return grad

        out = self.record((x,), lambda: (), compute, backward)
        if out.node is not None:
            out.node.saved = [*out.node.saved, *self.pack([indices[0].storage])]
        return out

    def wide_softmax(self, x: Value, heads: int) -> Value:
        """softmax in x's own dtype, which the call names: autocast leaves it. Saves its result."""
        dtype = x.dtype

        def backward(grad: Value) -> Value:
            product = self.new_wide(heads, dtype)  # softmax_backward_cuda_out: grad * output
            out = self.new_wide(heads, dtype)
            del product
            return out

        out = self.record((x,), lambda: (), lambda: self.new_wide(heads, dtype), backward)
        self.save_output(out)
        return out

    def without_sinks(self, x: Value, heads: int) -> Value:
        """x[..., :-1], a view; slice_backward writes into zeros of the full size."""
        dtype = x.dtype
        return self.record(
            (x,),
            lambda: (),
            lambda: Value(self, x.storage, Size(heads, 1, 2), dtype),
            lambda grad: self.new_wide(heads, dtype),
        )

    def half_tables(self, x: Value, width: int) -> tuple[Value, Value]:
        """cos and sin of the frequencies as they are, not twice side by side."""
        size = Size(width // 2, 0, 1)
        angles = self.constant(size, "fp32")
        cos, sin = self.constant(size, "fp32"), self.constant(size, "fp32")
        del angles
        return self.to(cos, x.dtype), self.to(sin, x.dtype)

    def dense_cat(self, parts: tuple[Value, ...]) -> Value:
        """cat lays its result out in the order of the shape."""
        out = self.cat(parts)
        out.strided = False
        return out

    def plain_softmax(self, x: Value) -> Value:
        """softmax whose call names x's dtype."""
        size, dtype = x.size, x.dtype
        out = self.record(
            (x,),
            lambda: (),
            lambda: self.new(size, dtype),
            lambda grad: self.softmax_backward(grad, dtype),
        )
        self.save_output(out)
        return out

    def clamp(self, x: Value, bounds: int) -> Value:
        """clamp: saves self; clamp_backward compares it with each bound, then chooses."""
        size, dtype = x.size, x.dtype

        def backward(grad: Value) -> Value:
            inside = [self.new(size, "bool") for _ in range(bounds)]
            out = self.new(size, grad.dtype)
            del inside
            return out

        return self.record((x,), lambda: (x,), lambda: self.new(size, dtype), backward)
