"""Activations that a library writes in Python: several pointwise ops, each with its own tensors.

Sources: transformers 5.17 activations.py; models/bloom/modeling_bloom.py.
"""

from __future__ import annotations

from vramplan.memory.ops import Ops
from vramplan.memory.values import Value


class Activations(Ops):
    """Mirrors of Python-level activations, term by term: a term's order is its lifetime."""

    def shift(self, x: Value) -> Value:
        """add.Scalar: saves nothing; the gradient passes through."""
        return self.clone(x)

    def gelu_new(self, x: Value) -> Value:
        """0.5 * x * (1.0 + tanh(c * (x + 0.044715 * pow(x, 3.0)))); autocast's pow gives fp32."""
        return x * 0.5 * self.shift(self.tanh((x + self.pow(x) * 1.0) * 1.0))

    def gelu_fast(self, x: Value) -> Value:
        """0.5 * x * (1.0 + tanh(x * c * (1.0 + 0.044715 * x * x)))"""
        return x * 0.5 * self.shift(self.tanh(x * 1.0 * self.shift(x * 1.0 * x)))

    def gelu_python(self, x: Value) -> Value:
        """x * 0.5 * (1.0 + erf(x / sqrt(2.0))); erf saves its input; a kernel more backward."""
        return x * 0.5 * self.shift(self.unary(x / 1.0, temporaries=1))

    def quick_gelu(self, x: Value) -> Value:
        """x * sigmoid(1.702 * x)"""
        return x * self.sigmoid(x * 1.0)

    def bloom_gelu(self, x: Value) -> Value:
        """GeLUFunction, an autograd function: keeps its input, computes the rest twice."""
        size, dtype = x.size, x.dtype

        def compute() -> Value:
            enabled, self.grad_enabled = self.grad_enabled, False
            out = x * 0.5 * self.shift(self.tanh(x * 1.0 * self.shift(x * 1.0 * x)))
            self.grad_enabled = enabled
            return out

        def backward(g: Value) -> Value:
            x = Value(self, None, size, dtype)  # its storage is held with what the node saved
            tanh_out = self.tanh(x * 1.0 * self.shift(x * 1.0 * x))
            ff = x * 0.5 * (self.shift(tanh_out * tanh_out) * self.shift(x * 1.0 * x))
            ff = ff + self.shift(tanh_out) * 1.0
            return ff * g

        return self.record((x,), lambda: (x,), compute, backward)
