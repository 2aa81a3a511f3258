"""Scaled dot-product attention: what each kernel keeps and what it needs while it runs.

Sources: aten/src/ATen/native/transformers/cuda/{attention.cu, attention_backward.cu,
sdp_utils.cpp} and flash_attn/flash_api.cpp of torch 2.11-2.13; flash_attn_interface.py of
flash-attn 2.8.
"""

from __future__ import annotations

from vramplan.memory.activations import Activations
from vramplan.memory.tape import Size, Value

HEAD_ROUNDING = 32  # flash backward's fp32 accumulator: head size up to a multiple of 32
EFFICIENT_ALIGNMENT = 32  # the memory-efficient kernel's log-sum-exp: rows padded to 32


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Attention(Activations):
    """The fused kernels behind `scaled_dot_product_attention` and flash-attn."""

    def flash(
        self, q: Value, k: Value, v: Value, heads: int, kv_heads: int, head_dim: int
    ) -> Value:
        """Flash kernel: saves q, k, v, output and log-sum-exp (fp32, batch x heads x sequence).

        Backward (mha_bwd): dq, dk, dv, softmax_d and an fp32 accumulator for dq; with grouped
        heads also dk and dv expanded to all heads before they are summed. Output and gradients
        are laid out as the inputs (empty_like).
        """
        q, k, v = self.lower(q), self.lower(k), self.lower(v)
        rows = Size(heads, 1, 1)
        dtype, sizes = q.dtype, (q.size, k.size, v.size)
        layouts = (q.strided, k.strided, v.strided)
        by_product: list[Value] = []

        def compute() -> Value:
            out = self.new(q.size.per(q.size.count).times(heads * head_dim), dtype)
            out.strided = layouts[0]
            by_product.append(self.new(rows, "fp32"))
            return out

        def backward(grad: Value) -> tuple[Value, ...]:
            work = [self.new(rows, "fp32")]
            width = _round_up(head_dim, HEAD_ROUNDING)
            work.append(self.new(rows.times(width), "fp32"))
            grads = tuple(self.new(s, dtype) for s in sizes)
            if kv_heads != heads:
                work += [self.new(grad.size, dtype), self.new(grad.size, dtype)]
            for g, layout in zip(grads, layouts, strict=True):
                g.strided = layout
            del g, work
            return grads

        out = self.record((q, k, v), lambda: (q, k, v), compute, backward)
        self.save_output(out, *by_product)
        return out

    def efficient(
        self, q: Value, k: Value, v: Value, mask: Value | None, heads: int, value_dim: int
    ) -> Value:
        """Memory-efficient kernel (fp32, or a mask): saves q, k, v, mask, output, log-sum-exp.

        Backward (_efficient_attention_backward): delta; of 16-bit inputs dq is accumulated in
        fp32, for heads wider than 128 dk and dv too.
        """
        q, k, v = self.lower(q), self.lower(k), self.lower(v)
        rows = Size(heads, 1, 1)
        dtype, sizes = q.dtype, (q.size, k.size, v.size)
        by_product: list[Value] = []

        def compute() -> Value:
            out = self.new(rows.times(value_dim), dtype)
            out.strided = True
            by_product.append(self.new(rows, "fp32"))
            return out

        def backward(grad: Value) -> tuple[Value, ...]:
            work = [self.new(rows, "fp32")]
            if dtype != "fp32":
                tile = 128 if 96 < value_dim <= 128 else 64
                wide = rows.times(_round_up(value_dim, tile))
                work += [self.new(wide, "fp32") for _ in range(3 if value_dim > 128 else 1)]
            grads = tuple(self.new(s, dtype) for s in sizes)
            for g in grads:
                g.strided = True
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
            k, v = k.expand(heads // kv_heads), v.expand(heads // kv_heads)
        weights = self.matmul(q.dense_heads(), (k * 1.0).dense_heads(), Size(heads, 1, 2))
        del mask
        weights = self.safe_softmax(weights)
        weights = self.dropout(weights, dropout)
        return self.matmul(weights, v.dense_heads(), Size(heads * dim, 1, 1))

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

        out = self.record((x,), lambda: (), compute, lambda grad: self.new(size, dtype))
        self.save_output(out)
        return out
