"""One rule an op: what it saves for backward, what it allocates forward and backward.

Every rule names the autograd formula it comes from (tools/autograd/derivatives.yaml and
FunctionsManual.cpp of torch 2.11-2.13). A rule allocates its output with `new`; its backward
receives the gradients of its outputs and returns those of its inputs, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vramplan.memory.tape import Tape
from vramplan.memory.values import Size, Value

Probability = float  # Elementwise has a method of that name
WIDTH = {"bool": 0, "int64": 0, "bf16": 1, "fp16": 1, "fp32": 2}


def promote(a: str, b: str) -> str:
    """torch.result_type for the floating dtypes used here (bf16 with fp16 gives fp32)."""
    if WIDTH[a] == WIDTH[b] and a != b and WIDTH[a] == 1:
        return "fp32"
    return a if WIDTH[a] >= WIDTH[b] else b


def _broadcast(tape: Tape, a: Value, b: Value) -> Callable[[], Value]:
    """Makes a pointwise op's output: as large as the larger input, and laid out as that."""
    big = a if a.size == b.size or a.size.rank() >= b.size.rank() else b
    size, dtype, strided = big.size, promote(a.dtype, b.dtype), big.strided

    def compute() -> Value:
        out = tape.new(size, dtype)
        out.strided = strided
        return out

    return compute


class Elementwise(Tape):
    """Pointwise, reduction and view ops."""

    def constant(self, size: Size, dtype: str) -> Value:
        """A tensor without history: masks, position tables."""
        return self.new(size, dtype)

    def add(self, a: Value, b: Value) -> Value:
        """add.Tensor: saves nothing; both inputs receive the same gradient tensor."""
        compute = _broadcast(self, a, b)
        return self.record((a, b), lambda: (), compute, lambda grad: (grad, grad.alias()))

    def mul(self, a: Value, b: Value | Probability) -> Value:
        """mul.Tensor: each side saves the other; mul.Scalar and div.Scalar save nothing."""
        if not isinstance(b, Value):
            return self.unary(a, saves_input=False)
        dtype, compute = promote(a.dtype, b.dtype), _broadcast(self, a, b)
        need = (a.requires_grad, b.requires_grad)

        def backward(grad: Value) -> tuple[Value | None, Value | None]:
            return tuple(self.new(grad.size, dtype) if n else None for n in need)  # type: ignore

        saved = lambda: (b if need[0] else None, a if need[1] else None)  # noqa: E731
        return self.record((a, b), saved, compute, backward)

    def unary(
        self,
        x: Value,
        *,
        saves_input: bool = True,
        saves_output: bool = False,
        temporaries: int = 0,
    ) -> Value:
        """A pointwise op whose backward needs its input, its output, or neither."""

        def compute() -> Value:
            out = self.new(x.size, x.dtype)
            out.strided = x.strided
            return out

        def backward(grad: Value) -> Value:
            inner = [self.new(x_size, x_dtype) for _ in range(temporaries)]
            out = self.new(x_size, grad.dtype)
            del inner
            return out

        x_size, x_dtype = x.size, x.dtype
        out = self.record((x,), lambda: (x,) if saves_input else (), compute, backward)
        if saves_output:
            self.save_output(out)
        return out

    def minus(self, a: Value, b: Value) -> Value:
        """sub.Tensor: saves nothing; b's gradient is a negated copy, in the broadcast's size."""
        need = b.requires_grad

        def backward(grad: Value) -> tuple[Value | None, ...]:
            return grad, self.new(grad.size, grad.dtype) if need else None

        return self.record((a, b), lambda: (), _broadcast(self, a, b), backward)

    def clamp_in_place(self, x: Value) -> Value:
        """clamp_: saves a copy of self; clamp_backward chooses by two comparisons of it."""
        size, dtype = x.size, x.dtype

        def backward(grad: Value) -> Value:
            low, high = self.new(size, "bool"), self.new(size, "bool")
            out = self.new(size, dtype)
            del low, high
            return out

        def compute() -> Value:
            return Value(self, x.storage, size, dtype)

        return self.record((x,), lambda: (self.new(size, dtype),), compute, backward)

    def neg(self, x: Value) -> Value:
        """neg: saves nothing."""
        return self.unary(x, saves_input=False)

    def pow(self, x: Value) -> Value:
        """pow.Tensor_Scalar: saves self; backward grad * (exponent * self.pow(exponent - 1))."""
        return self.unary(self.full(x), temporaries=2)

    def rsqrt(self, x: Value) -> Value:
        """rsqrt: saves result; backward -0.5 * grad * result.pow(3), one number a row."""
        return self.unary(self.full(x), saves_input=False, saves_output=True, temporaries=2)

    def tanh(self, x: Value) -> Value:
        """tanh: saves result; tanh_backward is one kernel."""
        return self.unary(x, saves_input=False, saves_output=True)

    sigmoid = relu = tanh  # the same shape of rule: result saved, one kernel backward

    def silu(self, x: Value) -> Value:
        """silu, gelu: save self; one kernel backward."""
        return self.unary(x)

    gelu = silu

    def mean(self, x: Value, last: int) -> Value:
        """mean over the last dimension: saves nothing; backward expands, then divides (dense)."""
        size, dtype = x.size, x.dtype
        return self.record(
            (x,),
            lambda: (),
            lambda: self.new(size.per(last), dtype),
            lambda grad: self.new(size, dtype),
        )

    def to(self, x: Value, dtype: str) -> Value:
        """_to_copy, or the tensor itself when it already has that dtype."""
        if x.dtype == dtype:
            return x
        if x.parameter is not None:
            x = x.alias()
        before = x.dtype

        def compute() -> Value:
            out = self.new(x.size, dtype)
            out.strided = x.strided
            return out

        return self.record((x,), lambda: (), compute, lambda g: self.new(g.size, before))

    def float(self, x: Value) -> Value:
        return self.to(x, "fp32")

    def full(self, x: Value) -> Value:
        """Autocast's fp32 list (pow, rsqrt, layer_norm, softmax, nll_loss, ...)."""
        return self.to(x, "fp32") if self.autocast else x

    def lower(self, x: Value) -> Value:
        """Autocast's 16-bit list (linear, matmul, bmm, baddbmm, sdpa, ...).

        Copies of trainable fp32 weights are cached until autocast is left
        (aten/src/ATen/autocast_mode.cpp, cached_cast).
        """
        if not self.autocast or x.dtype == self.autocast or WIDTH[x.dtype] == 0:
            return x
        parameter = x.parameter
        if parameter is None or not parameter.requires_grad or parameter.dtype != "fp32":
            return self.to(x, self.autocast)
        if parameter.cast is None:
            parameter.cast = self.to(x, self.autocast)
            self.casts.append(parameter)
        return parameter.cast

    def clone(self, x: Value) -> Value:
        """clone or contiguous: a copy; the gradient passes through."""
        return self.record((x,), lambda: (), lambda: self.new(x.size, x.dtype), lambda grad: grad)

    def slice(self, x: Value, numerator: int, denominator: int) -> Value:
        """A view of a part; slice_backward writes the gradient into zeros of the full size.

        Indexing that takes everything is an alias, which autograd passes through.
        """
        if numerator == denominator:
            return x.alias()
        size, dtype = x.size, x.dtype
        part = size.times(numerator).per(denominator)

        def compute() -> Value:
            out = Value(self, x.storage, part, dtype)
            out.strided = x.strided
            return out

        return self.record((x,), lambda: (), compute, lambda grad: self.new(size, dtype))

    def split(self, x: Value, parts: Sequence[int]) -> tuple[Value, ...]:
        """split, chunk, unbind: views; backward concatenates the gradients."""
        size, dtype, total = x.size, x.dtype, sum(parts)

        def compute() -> tuple[Value, ...]:
            out = [Value(self, x.storage, size.times(n).per(total), dtype) for n in parts]
            for part in out:
                part.strided = x.strided
            return tuple(out)

        def backward(*grads: Value) -> Value:
            return self.new(size, dtype)

        return self.record((x,), lambda: (), compute, backward)

    def cat(self, values: Sequence[Value]) -> Value:
        """cat: saves nothing, is contiguous; the gradients are views of the incoming one."""
        count = sum(v.size.numel for v in values)
        big = max(values, key=lambda v: v.size.rank())
        dtype = big.dtype
        for v in values:
            dtype = promote(dtype, v.dtype)
        sizes = [v.size for v in values]

        def compute() -> Value:
            return self.new(Size(count, big.size.batch, big.size.seq), dtype)

        def backward(grad: Value) -> tuple[Value, ...]:
            return tuple(Value(self, grad.storage, s, grad.dtype, view=True) for s in sizes)

        return self.record(tuple(values), lambda: (), compute, backward)

    def expand(self, x: Value, times: int, view: bool = False) -> Value:
        """expand + reshape (repeat_kv): a copy, a view of a single head; the gradient is summed."""
        if times == 1:
            return x
        size, dtype = x.size, x.dtype

        def compute() -> Value:
            if not view:
                return self.new(size.times(times), dtype)
            out = Value(self, x.storage, size.times(times), dtype)
            out.strided = True
            return out

        return self.record((x,), lambda: (), compute, lambda grad: self.new(size, dtype))

    def dropout(self, x: Value, p: Probability) -> Value:
        """native_dropout (fused on CUDA): an output and a bool mask, the mask saved; p=0 is x."""
        if p <= 0:
            return x
        size, dtype = x.size, x.dtype
        mask: list[Value] = []

        def compute() -> Value:
            self.works("one kernel", 0.8)
            out = self.new(size, dtype)
            mask.append(self.new(size, "bool"))
            return out

        out = self.record((x,), lambda: (), compute, lambda grad: self.new(size, dtype))
        if out.node is not None:
            kept = self.pack([mask[0].storage])
            out.node.saved = [*out.node.saved, *kept]
        return out

    def masked_fill(self, x: Value, mask: Value) -> Value:
        """masked_fill.Scalar: saves mask; backward masks a copy of the gradient."""
        return self.record(
            (x,),
            lambda: (mask,),
            lambda: self.new(x.size, x.dtype),
            lambda grad: self.new(grad.size, grad.dtype),
        )


class Ops(Elementwise):
    """Products, norms and softmax."""

    def matmul(self, a: Value, b: Value, out: Size) -> Value:
        """bmm: each operand saves the other."""
        a, b = self.lower(a), self.lower(b)
        sizes, need, dtype = (a.size, b.size), (a.requires_grad, b.requires_grad), a.dtype

        def compute() -> Value:
            self.works("batched product", sizes, out, dtype)
            return self.new(out, dtype)

        def backward(grad: Value) -> tuple[Value | None, ...]:
            for _ in range(sum(need)):
                self.works("batched product", sizes, out, dtype)
            return tuple(
                self.new(s, dtype) if n else None for s, n in zip(sizes, need, strict=True)
            )

        saved = lambda: (b if need[0] else None, a if need[1] else None)  # noqa: E731
        return self.record((a, b), saved, compute, backward)

    def dense(self, x: Value, weight: Value, bias: Value | None, n_in: int, n_out: int) -> Value:
        """linear (mm / addmm on a 2-D view): x saved for the weight, the weight saved for x.

        Both gradients come back through views (of the rows, of weight.t()), which cannot be
        accumulated into in place; the bias' is the incoming one, summed by the engine.
        """
        x, weight = self.lower(x), self.lower(weight)
        if bias is not None:
            self.epilogues.add(self.recomputing)
        inputs = (x, weight) if bias is None else (x, weight, self.lower(bias))
        need = tuple(v.requires_grad for v in inputs)
        sizes = (x.size, weight.size)
        dtype = x.dtype
        rows = x.size.per(n_in)
        size = rows.times(n_out)

        def compute() -> Value:
            self.works("product", rows, n_in, n_out, dtype, "forward")
            return self.new(size, dtype)

        def backward(grad: Value) -> tuple[Value | None, ...]:
            for needed, of in zip(need, ("input", "weight"), strict=False):
                if needed:
                    self.works("product", rows, n_in, n_out, dtype, of)
            grads = [
                self.new(s, dtype) if n else None for s, n in zip(sizes, need[:2], strict=True)
            ]
            for g in grads:
                if g is not None:
                    g.view = True
            return *grads, *(grad if n else None for n in need[2:])

        saved = lambda: (weight if need[0] else None, x if need[1] else None)  # noqa: E731
        return self.record(inputs, saved, compute, backward)

    def layer_norm(self, x: Value, weight: Value | None, bias: Value | None, width: int) -> Value:
        """native_layer_norm: saves inputs, mean and rstd (fp32); on autocast's fp32 list."""
        x = self.full(x)
        inputs = [x] + [self.full(v) for v in (weight, bias) if v is not None]
        sizes = [(v.size, v.dtype, v.requires_grad) for v in inputs]
        rows = x.size.per(width)
        statistics: list[Value] = []

        def compute() -> Value:
            self.works("one kernel", 1.0)
            out = self.new(x.size, x.dtype)
            statistics.extend((self.new(rows, "fp32"), self.new(rows, "fp32")))
            return out

        def backward(grad: Value) -> tuple[Value | None, ...]:
            return tuple(self.new(s, d) if n else None for s, d, n in sizes)

        out = self.record(inputs, lambda: inputs, compute, backward)
        if out.node is not None:
            kept = self.pack([v.storage for v in statistics])
            out.node.saved = [*out.node.saved, *kept]
        return out

    def softmax(self, x: Value, dtype: str | None = None) -> Value:
        """softmax: saves result. `dtype` converts first; CUDA fuses that for fp16 alone."""
        target = "fp32" if self.autocast else dtype or x.dtype
        fused = target == "fp32" and x.dtype == "fp16"
        if not fused:
            x = self.to(x, target)
        size, before = x.size, x.dtype
        out = self.record(
            (x,),
            lambda: (),
            lambda: self.new(size, target),
            lambda grad: self.softmax_backward(grad, before),
        )
        self.save_output(out)
        return out

    def softmax_backward(self, grad: Value, dtype: str) -> Value:
        """softmax_backward_cuda_out (SoftMax.cu): grad * output is a tensor of its own."""
        product = self.new(grad.size, grad.dtype)
        out = self.new(grad.size, dtype)
        del product
        return out
