"""Scaled dot-product attention: what each kernel keeps and what it needs while it runs.

Sources: aten/src/ATen/native/transformers/cuda/{attention.cu, attention_backward.cu,
sdp_utils.cpp} and flash_attn/flash_api.cpp of torch 2.11-2.13; flash_attn_interface.py of
flash-attn 2.8.
"""

from __future__ import annotations

from vramplan.memory.activations import Activations
from vramplan.memory.precision import Policy
from vramplan.memory.values import Size, Value

HEAD_ROUNDING = 32  # flash backward's fp32 accumulator: head size up to a multiple of 32


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Attention(Activations):
    """Heads and scores; the fused kernels behind `scaled_dot_product_attention` and flash-attn."""

    policy: Policy

    # -- heads and scores ---------------------------------------------------------------------
    def split_heads(self, x: Value) -> Value:
        """view + transpose: no copy; backward a copy unless the gradient lies so already."""
        size, dtype = x.size, x.dtype

        def compute() -> Value:
            out = Value(self, x.storage, size, dtype)
            out.strided = True
            return out

        def backward(grad: Value) -> Value:
            return (
                Value(self, grad.storage, size, dtype, view=True)
                if grad.strided
                else self.new(size, dtype)
            )

        return self.record((x,), lambda: (), compute, backward)

    def dense_heads(self, x: Value) -> Value:
        """reshape before bmm: heads that lie behind tokens in memory are copied (batch > 1)."""
        if not x.strided or self.policy.single_sequence:
            return x
        return self.clone(x)

    def scores(self, q: Value, k: Value, heads: int) -> Value:
        """query @ key^T: batch x heads x sequence x sequence."""
        return self.matmul(self.dense_heads(q), self.dense_heads(k), Size(heads, 1, 2))

    def weighted(self, weights: Value, v: Value, heads: int) -> Value:
        """weights @ value"""
        rows = Size(heads * (v.size.numel // heads), 1, 1)
        return self.matmul(weights, self.dense_heads(v), rows)

    def empty_scores(self, heads: int, dtype: str) -> Value:
        return self.constant(Size(heads, 1, 2), dtype)

    # -- kernels ------------------------------------------------------------------------------
    def flash(
        self, q: Value, k: Value, v: Value, heads: int, kv_heads: int, head_dim: int
    ) -> Value:
        """Flash kernel: mha_fwd, mha_bwd. An output laid out by heads needs its gradient copied."""
        width = _round_up(head_dim, HEAD_ROUNDING if head_dim <= 128 else 2 * HEAD_ROUNDING)
        return self.fused((q, k, v), None, heads, kv_heads, head_dim, width, copies=not q.strided)

    def cudnn(
        self,
        q: Value,
        k: Value,
        v: Value,
        mask: Value | None,
        heads: int,
        kv_heads: int,
        dims: tuple[int, int],
    ) -> Value:
        """cuDNN's kernel, which Hopper prefers in 16 bits, with or without a mask."""
        return self.fused((q, k, v), mask, heads, kv_heads, dims[1], dims[0])

    def fused(
        self,
        qkv: tuple[Value, Value, Value],
        mask: Value | None,
        heads: int,
        kv_heads: int,
        value_dim: int,
        width: int,
        copies: bool = False,
    ) -> Value:
        """Saves q, k, v, mask, output, log-sum-exp (fp32, batch x heads x sequence), seed, offset.

        Backward: dq, dk, dv, a row sum and an fp32 accumulator of dq, `width` a head; with grouped
        heads also dk and dv of all heads before they are summed. Output and gradients are laid
        out as the inputs (empty_like). Measured on an H100 for head sizes from 64 to 256: both
        kernels' allocations are these to 512 bytes.
        """
        lowered = tuple(self.lower(x) for x in qkv)
        rows, dtype = Size(heads, 1, 1), lowered[0].dtype
        facts = [(x.size, x.strided) for x in lowered]
        by_products: list[Value] = []
        figures = (heads, facts[0][0].numel // heads, value_dim, dtype, mask is None)

        def compute() -> Value:
            self.works("attention", "fused", "forward", *figures)
            out = self.new(rows.times(value_dim), dtype)
            out.strided = facts[0][1]
            by_products.append(self.new(rows, "fp32"))
            by_products.extend((self.new(Size(1), "int64"), self.new(Size(1), "int64")))
            return out

        def backward(grad: Value) -> tuple[Value, ...]:
            self.works("attention", "fused", "backward", *figures)
            work = [self.new(rows, "fp32"), self.new(rows.times(width), "fp32")]
            grads = tuple(self.new(size, dtype) for size, _ in facts)
            if copies:
                work.append(self.new(grad.size, dtype))
            if kv_heads != heads:
                work += [self.new(size.per(kv_heads).times(heads), dtype) for size, _ in facts[1:]]
            for g, (_, strided) in zip(grads, facts, strict=True):
                g.strided = strided
            del g, work
            return grads

        saved = lambda: (*lowered, *([mask] if mask is not None else []))  # noqa: E731
        out = self.record(lowered, saved, compute, backward)
        self.save_output(out, *by_products)
        return out

    def efficient(
        self, q: Value, k: Value, v: Value, mask: Value | None, heads: int, value_dim: int
    ) -> Value:
        """Memory-efficient kernel (fp32; 16 bits with a mask where cuDNN isn't preferred).

        Saves q, k, v, mask, output, log-sum-exp. Heads wider than 128: the output is accumulated in
        fp32. Backward (_efficient_attention_backward): delta, and dq accumulated in fp32 by tiles
        of 64 or 128 columns; for 16-bit heads wider than 128 dk and dv too. Measured on an H100 for
        head sizes 64 to 256 in both: exact to a row or two but for 16-bit heads of 256, where three
        accumulators are an eighth of the head too many.
        """
        q, k, v = self.lower(q), self.lower(k), self.lower(v)
        rows = Size(heads, 1, 1)
        dtype, facts = q.dtype, [(x.size, x.strided) for x in (q, k, v)]
        dim = q.size.numel // heads
        half = dtype != "fp32"
        by_product: list[Value] = []
        figures = (heads, dim, value_dim, dtype, mask is None)

        def compute() -> Value:
            self.works("attention", "efficient", "forward", *figures)
            out = self.new(rows.times(value_dim), dtype)
            out.strided = True
            by_product.append(self.new(rows, "fp32"))
            if half and dim > 128:
                accumulator = self.new(rows.times(value_dim), "fp32")
                del accumulator
            return out

        def backward(grad: Value) -> tuple[Value, ...]:
            self.works("attention", "efficient", "backward", *figures)
            tile = 64 if dim <= 64 or (half and dim > 128) else 128
            wide = rows.times(_round_up(dim, tile) + (0 if half else 1))
            work = [self.new(rows, "fp32")]
            work += [self.new(wide, "fp32") for _ in range(3 if half and dim > 128 else 1)]
            grads = tuple(self.new(size, dtype) for size, _ in facts)
            for g, (_, strided) in zip(grads, facts, strict=True):
                g.strided = strided
            del g, work
            return grads

        saved = lambda: (q, k, v, *([mask] if mask is not None else []))  # noqa: E731
        out = self.record((q, k, v), saved, compute, backward)
        self.save_output(out, *by_product)
        return out

    def math(
        self,
        q: Value,
        k: Value,
        v: Value,
        heads: int,
        kv_heads: int,
        dim: int,
        dropout: float = 0.0,
    ) -> Value:
        """_scaled_dot_product_attention_math: plain products (fp32 with grouped heads, say)."""
        q, k, v = self.lower(q), self.lower(k), self.lower(v)
        q = q * 1.0
        allowed = self.new(Size(1, 0, 2), "bool")
        mask = self.new(Size(1, 0, 2), q.dtype)
        del allowed
        if kv_heads != heads:
            k, v = self.expand(k, heads // kv_heads), self.expand(v, heads // kv_heads)
        weights = self.matmul(self.dense_heads(q), self.dense_heads(k * 1.0), Size(heads, 1, 2))
        weights = self.safe_softmax(weights)
        weights = self.dropout(weights, dropout)
        out = self.matmul(weights, self.dense_heads(v), Size(heads * dim, 1, 1))
        del mask  # bound until the function returns
        return out

    def safe_softmax(self, x: Value) -> Value:
        """_safe_softmax: softmax, then rows that are all -inf (found by a mask) set to 0 in place.

        Saves result.
        """
        size, dtype = x.size, x.dtype

        def compute() -> Value:
            out = self.new(size, dtype)
            masked = self.new(size, "bool")
            del masked
            return out

        out = self.record((x,), lambda: (), compute, lambda g: self.softmax_backward(g, dtype))
        self.save_output(out)
        return out
