"""Projections fused for query, key and value, taken apart by views; alibi; one key for all heads.

Sources: transformers 5.17 models/{bloom,falcon}/modeling_*.py; aten/src/ATen/native/transformers/
attention.cpp (_scaled_dot_product_attention_math), LinearAlgebra.cpp (matmul) of torch 2.13.
"""

from __future__ import annotations

from vramplan.memory.attention import Attention
from vramplan.memory.values import Size, Value


class FusedHeads(Attention):
    """Rules for what BLOOM and Falcon do with heads."""

    def behind(self, x: Value) -> Value:
        """transpose(1, 2): heads before tokens in shape, behind them in memory."""
        out = x.alias()
        out.strided = True
        return out

    def select_heads(self, x: Value) -> Value:
        """view(..., heads, 3, head_dim)[..., i, :].transpose(1, 2): backward into zeros of all."""
        return self.behind(self.slice(x, 1, 3))

    def index(self, x: Value, numerator: int, denominator: int) -> Value:
        """x[..., [i], :]: a copy; saves [i]; index_backward puts the gradient into zeros of all."""
        size, dtype = x.size, x.dtype
        part = size.times(numerator).per(denominator)
        index = self.constant(Size(1), "int64")
        return self.record(
            (x,),
            lambda: (index,),
            lambda: self.new(part, dtype),
            lambda grad: self.new(size, dtype),
        )

    def flat_expand(self, x: Value, times: int) -> Value:
        """broadcast_to, then flatten: a copy unless there is nothing to repeat."""
        return self.behind(self.expand(x, times))

    def broadcast(self, x: Value, times: int) -> Value:
        """matmul's expansion of one head to all: a copy if heads and batch are merged.

        Autocast casts what matmul is given, before it is expanded.
        """
        if times == 1:
            return x
        x = self.lower(x)
        if not self.policy.single_sequence:
            return self.expand(x, times)
        size, full, dtype = x.size, x.size.times(times), x.dtype
        return self.record(
            (x,),
            lambda: (),
            lambda: Value(self, x.storage, full, dtype),
            lambda grad: self.new(size, dtype),
        )

    def add_into(self, x: Value, other: Value) -> Value:
        """add_: into x's storage."""
        return self.record(
            (x, other),
            lambda: (),
            lambda: Value(self, x.storage, x.size, x.dtype),
            lambda grad: (grad, grad.alias()),
        )

    def scale_into(self, x: Value) -> Value:
        """mul_ or div_ by a number: into x's storage; backward a scaled copy."""
        return self.record(
            (x,),
            lambda: (),
            lambda: Value(self, x.storage, x.size, x.dtype),
            lambda grad: self.new(grad.size, grad.dtype),
        )

    def softmax_in(self, x: Value, dtype: str) -> Value:
        """softmax(dtype=...): autocast keeps a dtype that is given."""
        autocast, self.autocast = self.autocast, None
        out = self.softmax(x, dtype)
        self.autocast = autocast
        return out

    def baddbmm(self, base: Value, a: Value, b: Value, heads: int) -> Value:
        """base + alpha * a @ b: saves a and b; each gradient is a product, then its scaled copy."""
        inputs = (base, a, b)
        size, dtype = Size(heads, 1, 2), a.dtype

        need = [(x.size, x.requires_grad) for x in inputs]

        sizes = (a.size, b.size)

        def compute() -> Value:
            self.works("batched product", sizes, size, dtype)
            return self.new(size, dtype)

        def scaled(size: Size, needed: bool) -> Value | None:
            if not needed:
                return None
            self.works("batched product", sizes, Size(heads, 1, 2), dtype)
            product = self.new(size, dtype)
            out = self.new(size, dtype)
            del product
            return out

        saved = lambda: (b if a.requires_grad else None, a if b.requires_grad else None)  # noqa: E731
        return self.record(
            inputs,
            saved,
            compute,
            lambda grad: tuple(scaled(*part) for part in need),
        )

    # -- masks --------------------------------------------------------------------------------
    def boolean_mask(self) -> Value:
        """masking_utils.sdpa_mask: batch x 1 x sequence x sequence."""
        return self.new(Size(1, 1, 2), "bool")

    def alibi(self, heads: int, dtype: str) -> Value:
        """build_alibi_tensor: slopes times positions, batch x heads x 1 x sequence."""
        positions = self.new(Size(1, 1, 1), "int64")
        biases = self.new(Size(heads, 1, 1), "fp32")
        del positions
        return self.to(biases, dtype)

    def alibi_mask(self, alibi: Value, mask: Value, heads: int) -> Value:
        """masked_fill of alibi: batch x heads x sequence x sequence."""
        if mask.dtype == "bool":
            mask = self.new(mask.size, alibi.dtype)
        forbidden = self.new(mask.size, "bool")
        out = self.new(Size(heads, 1, 2), alibi.dtype)
        del forbidden
        return out

    def additive(self, mask: Value, q: Value) -> Value:
        """The mask as the kernel takes it: of the query's dtype, made from booleans if need be."""
        dtype = self.autocast or q.dtype
        return self.new(mask.size, dtype) if mask.dtype != dtype else mask

    def broadcast_math(
        self, q: Value, k: Value, v: Value, mask: Value, heads: int, dim: int
    ) -> Value:
        """_scaled_dot_product_attention_math in fp32 with one key and value for all heads."""
        before = self.autocast or q.dtype
        mask = self.additive(mask, q)
        lowered = [self.lower(x) for x in (q, k, v)]
        accurate = [self.float(x) for x in lowered]
        autocast, self.autocast = self.autocast, None
        query = accurate[0] * 1.0
        weights = self.matmul(
            self.dense_heads(query),
            self.broadcast(self.dense_heads(accurate[1] * 1.0), heads),
            Size(heads, 1, 2),
        )
        weights = self.safe_softmax(weights)
        out = self.matmul(weights, self.broadcast(accurate[2], heads), Size(heads * dim, 1, 1))
        out = self.to(out, before)
        self.autocast = autocast
        return out
