"""Multi-head latent attention (DeepSeek): keys put together from two parts, complex rotation.

Sources: transformers 5.17 models/deepseek_{v2,v3}/modeling_*.py (expand_kv, apply_rotary_emb);
torch/csrc/autograd/custom_function.h and functions/tensor.cpp (CopySlices::apply).
"""

from __future__ import annotations

from vramplan.memory.sinks import Sinks
from vramplan.memory.values import Size, Value


class Latent(Sinks):
    """What latent attention adds to the ops."""

    def assemble(self, nope: Value, rope: Value) -> Value:
        """new_empty, then two slices of it written by copy_: two CopySlices nodes.

        Each copies the whole gradient, clones its slice (the part's gradient), and all but the
        first make zeros for what the slice held before.
        """
        size, dtype = Size(nope.size.numel + rope.size.numel, 1, 1), nope.dtype
        parts = (nope.size, rope.size)

        def first_backward(grad: Value) -> Value:
            whole = self.new(size, dtype)
            part = self.new(parts[0], dtype)
            del whole
            return part

        def second_backward(grad: Value) -> tuple[Value, Value]:
            whole, part = self.new(size, dtype), self.new(parts[1], dtype)
            zeros = self.new(parts[1], dtype)
            del zeros
            return whole, part

        keys = self.record((nope,), lambda: (), lambda: self.new(size, dtype), first_backward)
        return self.record(
            (keys, rope),
            lambda: (),
            lambda: Value(self, keys.storage, size, dtype),
            second_backward,
        )

    def spread(self, x: Value, times: int) -> Value:
        """expand, a view; backward sums."""
        size, dtype = x.size, x.dtype
        return self.record(
            (x,),
            lambda: (),
            lambda: Value(self, x.storage, size.times(times), dtype),
            lambda grad: self.new(size, dtype),
        )

    def join(self, a: Value, b: Value) -> Value:
        """cat of two parts of a head, dense; the gradients are views that lie as the whole does."""
        sizes, dtype = (a.size, b.size), a.dtype

        def backward(grad: Value) -> tuple[Value, ...]:
            parts = tuple(Value(self, grad.storage, s, grad.dtype, view=True) for s in sizes)
            for part in parts:
                part.strided = grad.strided
            return parts

        size = Size(a.size.numel + b.size.numel, 1, 1)
        return self.record((a, b), lambda: (), lambda: self.new(size, dtype), backward)

    def frequencies(self, width: int) -> Value:
        """torch.polar and a scaling: complex64, so `width` times 4 bytes a token."""
        angles = self.constant(Size(width // 2, 0, 1), "fp32")
        ones = self.constant(Size(width // 2, 0, 1), "fp32")
        polar = self.constant(Size(width, 0, 1), "fp32")
        del ones
        out = self.constant(Size(width, 0, 1), "fp32")
        del angles, polar
        return out

    def rotate_complex(self, x: Value, frequencies: Value, before: str) -> Value:
        """view_as_real(x * frequencies).type_as(before): backward conjugates a copy of them.

        view_as_real's backward needs a gradient whose pairs lie together: one whose heads lie
        behind its tokens is copied.
        """
        size, rows = x.size, frequencies.size

        def turned(grad: Value) -> Value:
            conjugate = self.new(rows, "fp32")
            out = self.new(size, "fp32")
            del conjugate
            return out

        def paired(grad: Value) -> Value:
            return self.new(size, "fp32") if grad.strided else grad

        def product() -> Value:
            return self.new(size, "fp32")

        out = self.record((x,), lambda: (frequencies,), product, turned)
        out = self.record(
            (out,), lambda: (), lambda: Value(self, out.storage, size, "fp32"), paired
        )
        return self.to(out, before)

    def padded_flash(self, q: Value, k: Value, v: Value, heads: int, dim: int, value: int) -> Value:
        """integrations/flash_attention.py: values padded to the keys' size, the output cropped."""
        size, dtype = v.size, v.dtype
        wide = Size(heads * dim, 1, 1)
        v = self.record(
            (v,), lambda: (), lambda: self.new(wide, dtype), lambda grad: self.new(size, dtype)
        )
        out = self.flash(q, k, v, heads, heads, dim)
        return self.clone(self.slice(out, value, dim))
