"""The modules that descriptions are written in: linear (with LoRA and quantization), embedding.

Each method mirrors the forward of the library's module, so its variables live as long as there.
Sources: peft 0.21 tuners/lora/{layer,bnb}.py; bitsandbytes 0.50 autograd/_functions.py,
nn/modules.py, backends/cuda/ops.py; transformers 5.17 loss/loss_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable

from vramplan.memory import outliers
from vramplan.memory.fused_heads import FusedHeads
from vramplan.memory.precision import Policy
from vramplan.memory.values import ITEMSIZE, LEAF_ORDER, Node, Parameter, Size, Storage, Value

FUSED_MAX_HEAD = 256  # sdp_utils.cpp, check_head_dim_size_flash and check_cudnn_tensor_shapes
ABSMAX_BLOCK = 64  # 4-bit weights share an absmax in blocks of 64 (bitsandbytes' default)


class Graph(FusedHeads):
    """A tape with a policy, on which a family's description runs."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.autocast = policy.autocast
        self.shared: dict[str, Parameter] = {}

    # -- weights ------------------------------------------------------------------------------
    def parameter(self, name: str, *shape: int, trains: bool | None = None) -> Value:
        """A weight of the model as loaded (fp32 where peft upcast it), shared if tied by name."""
        count = 1
        for n in shape:
            count *= n
        parameter = self.shared.get(name)
        if parameter is None:
            trains = self.policy.trains_base if trains is None else trains
            parameter = self._declare(name, count, self.policy.weight_dtype, trains)
        return self.leaf(parameter)

    def _declare(self, name: str, count: int, dtype: str, trains: bool) -> Parameter:
        parameter = Parameter(name, Size(count), dtype, trains)
        if self.policy.accumulating and trains:
            parameter.grad = Value(self, None, parameter.size, dtype)
        self.shared[name] = parameter
        return parameter

    def adapter(self, name: str, count: int) -> Value:
        parameter = self.shared.get(name)
        if parameter is None:
            parameter = self._declare(name, count, self.policy.adapter_dtype, True)
        return self.leaf(parameter)

    # -- linear -------------------------------------------------------------------------------
    def linear(
        self,
        x: Value,
        name: str,
        n_in: int,
        n_out: int,
        bias: bool = False,
        quantizable: bool = True,
        adaptable: bool = True,
        transposed: bool = False,
        product: bool = False,
    ) -> Value:
        """nn.Linear, Conv1D (`transposed`) or a subclass that multiplies by weight.T (`product`).

        Plain or quantized, with or without an adapter.
        """
        policy = self.policy
        quantized = policy.quantization if quantizable else "product" if product else None
        if not adaptable or not policy.adapts(name):
            return self.base_linear(x, name, n_in, n_out, bias, quantized)
        if quantized in (None, "product"):
            return self.lora_linear(x, name, n_in, n_out, bias, quantized)
        return self.lora_quantized(x, name, n_in, n_out, bias, quantized)

    def base_linear(
        self, x: Value, name: str, n_in: int, n_out: int, bias: bool, quantized: str | None
    ) -> Value:
        offset = self.parameter(f"{name}.bias", n_out) if bias else None
        if quantized == "product":
            return self.product(x, name, n_in, n_out, offset)
        if quantized == "int8":
            return self.linear_int8(x, n_in, n_out, offset)
        if quantized:
            return self.linear_4bit(x, n_in, n_out, offset)
        return self.dense(x, self.parameter(f"{name}.weight", n_out, n_in), offset, n_in, n_out)

    def lora_branch(self, x: Value, name: str, n_in: int, n_out: int) -> Value:
        """lora_B(lora_A(dropout(x))) * scaling"""
        rank = self.policy.rank
        assert rank is not None
        down = self.adapter(f"{name}.lora_A.weight", rank * n_in)
        up = self.adapter(f"{name}.lora_B.weight", n_out * rank)
        dropped = self.dropout(x, self.policy.lora_dropout)
        hidden = self.dense(dropped, down, None, n_in, rank)
        del dropped
        out = self.dense(hidden, up, None, rank, n_out)
        del hidden
        return out * 1.0

    def product(self, x: Value, name: str, n_in: int, n_out: int, bias: Value | None) -> Value:
        """x @ weight.T, then + bias: autocast does not cache the copy of a view of a weight."""
        weight = self.parameter(f"{name}.weight", n_out, n_in)
        weight.parameter = None
        out = self.dense(x, weight, None, n_in, n_out)
        return out if bias is None else out + bias

    def lora_linear(
        self, x: Value, name: str, n_in: int, n_out: int, bias: bool, kind: str | None = None
    ) -> Value:
        """peft lora.Linear.forward: the input is cast to the adapter's dtype."""
        result = self.base_linear(x, name, n_in, n_out, bias, kind)
        before = result.dtype
        x = self.to(x, self.policy.adapter_dtype)
        result = result + self.lora_branch(x, name, n_in, n_out)
        return self.to(result, before)

    def lora_quantized(
        self, x: Value, name: str, n_in: int, n_out: int, bias: bool, kind: str
    ) -> Value:
        """peft lora.Linear4bit / Linear8bitLt.forward: 4-bit clones its output defensively."""
        result = self.base_linear(x, name, n_in, n_out, bias, kind)
        if kind != "int8":
            result = self.clone(result)
        before = result.dtype
        if not self.autocast:
            x = self.to(x, self.policy.adapter_dtype)
        output = self.lora_branch(x, name, n_in, n_out)
        if not self.autocast:
            output = self.to(output, before)
        return result + output

    def linear_4bit(self, x: Value, n_in: int, n_out: int, bias: Value | None) -> Value:
        """bitsandbytes Linear4bit: dequantizes the whole weight, forward and backward."""
        before = x.dtype
        x = self.to(x, self.policy.compute_dtype)
        if bias is not None:
            self.epilogues.add(self.recomputing)
            bias = self.to(bias, self.policy.compute_dtype)
        size, dtype = x.size, x.dtype

        def dequantized(target: str) -> list[Value]:
            weights = Size(n_in * n_out)
            work = []
            if self.policy.double_quant:
                absmax = Size(-(-n_in * n_out // ABSMAX_BLOCK))
                work += [self.new(absmax, "fp32"), self.new(absmax, "fp32")]
            return [*work, self.new(weights, target)]

        def compute() -> Value:
            self.works("dequantize", n_in * n_out, dtype)
            self.works("product", size.per(n_in), n_in, n_out, dtype, "forward")
            work = dequantized(dtype)
            out = self.new(size.per(n_in).times(n_out), dtype)
            del work
            return out

        def backward(grad: Value) -> tuple[Value | None, ...]:
            self.works("dequantize", n_in * n_out, self.policy.dtype)
            self.works("product", size.per(n_in), n_in, n_out, grad.dtype, "input")
            work = dequantized(self.policy.dtype)
            if grad.dtype != self.policy.dtype:
                work.append(self.new(Size(n_in * n_out), grad.dtype))
            out = self.new(size, grad.dtype)
            del work
            return (out,)

        inputs = (x,) if bias is None else (x, bias)
        return self.to(self.record(inputs, lambda: (), compute, backward), before)

    def linear_int8(self, x: Value, n_in: int, n_out: int, bias: Value | None) -> Value:
        """bitsandbytes MatMul8bitLt: keeps its input on ctx, out of checkpointing's reach."""
        size, dtype = x.size, x.dtype
        rows, tail = size.per(n_in), x.tail
        kept: list[Storage | None] = [x.storage]

        def compute() -> Value:
            self.works("int8", rows, n_in, n_out, dtype, "forward", tail)
            half = self.new(size, "fp16") if dtype != "fp16" else None
            quantized, scales = self.new(size, "int8"), self.new(rows, "fp32")
            absolute = self.new(size, "fp16")
            large = self.new(size, "bool")
            del absolute
            del large, half
            columns = self.outlier_columns(x, n_in, n_out, kept) if x.tail else None
            accumulated = self.new(rows.times(n_out), "int32")
            out = self.new(rows.times(n_out), "fp16")
            if dtype != "fp16":
                out = self.new(rows.times(n_out), dtype)
            del accumulated
            if columns is not None:
                # output.addmm(subA, subB): autocast casts all three, and the result
                added, casts = self.autocast or dtype, []
                if added != dtype:
                    width = ITEMSIZE[added]
                    casts = [
                        self.new(rows.times(n_out), added).storage,
                        self.allocate((size.numel * width, x.tail, outliers.ROWS)),
                        self.allocate((n_in * n_out * width, x.tail, outliers.COLUMNS)),
                    ]
                out = self.new(rows.times(n_out), added)
                del casts
            del quantized, scales, columns
            return out

        def backward(grad: Value) -> tuple[Value | None, ...]:
            self.works("int8", rows, n_in, n_out, dtype, "input", tail)
            weight = self.new(Size(n_in * n_out), dtype)
            cast = self.new(grad.size, dtype) if grad.dtype != dtype else None
            out = self.new(size, dtype)
            out.view = True
            del weight, cast
            return (out,)

        inputs = (x,) if bias is None else (x, bias)
        return self.record(inputs, lambda: (), compute, backward, context=lambda: kept)

    def outlier_columns(
        self, x: Value, n_in: int, n_out: int, kept: list[Storage | None]
    ) -> Storage:
        """int8_mixed_scaled_mm: the input's outlier columns are kept, the weight's dequantized."""
        itemsize = ITEMSIZE[x.dtype]
        kept.append(self.allocate((x.size.numel * itemsize, x.tail, outliers.ROWS)))
        packed = self.allocate((n_in * n_out, x.tail, outliers.COLUMNS))
        scaled = self.allocate((n_in * n_out * 4, x.tail, outliers.COLUMNS))
        weight = self.allocate((n_in * n_out * 4, x.tail, outliers.COLUMNS))
        del packed, scaled
        return weight

    def tailed(self, x: Value, deviation: float) -> Value:
        """Mark a gated product, whose factors have that standard deviation (outliers.py)."""
        x.tail = int(deviation * outliers.MICRO)
        return x

    # -- what descriptions call for -----------------------------------------------------------
    def activation(self, x: Value, name: str) -> Value:
        """ACT2FN: one kernel that saves its input (silu, gelu) or its output (relu, tanh)."""
        if name in ("gelu_new", "gelu_python", "gelu_fast", "quick_gelu"):
            rule: Callable[[Value], Value] = getattr(self, name)
            return rule(x)
        return self.tanh(x) if name in ("relu", "tanh", "sigmoid") else self.silu(x)

    def head(self, x: Value, name: str, n_in: int, n_out: int, bias: str | bool) -> Value:
        """The output projection: never quantized, never adapted by all-linear."""
        self.category = "logits"
        weight = self.parameter(name, n_out, n_in)
        offset = self.parameter(bias, n_out) if isinstance(bias, str) else None
        return self.dense(x, weight, offset, n_in, n_out)

    def causal_mask(self, x: Value) -> Value | None:
        """masking_utils.eager_mask: batch x 1 x sequence x sequence in the hidden states' dtype.

        The fused kernels take is_causal instead: an all-ones padding mask is dropped.
        """
        return self.eager_mask(x) if self.policy.attention == "eager" else None

    def eager_mask(self, x: Value) -> Value:
        """Allowed or not, then 0 or the least number of the hidden states' dtype."""
        allowed = self.constant(Size(1, 1, 2), "bool")
        mask = self.constant(Size(1, 1, 2), x.dtype)
        del allowed
        return mask

    def sliding_mask(self, x: Value) -> Value | None:
        """masking_utils.create_sliding_window_causal_mask: under sdpa boolean, and left out while
        the sequence is within the window; under flash_attention_2 the kernel knows the window.
        """
        if self.policy.attention == "sdpa" and self.policy.beyond_window:
            return self.constant(Size(1, 1, 2), "bool")
        return self.causal_mask(x)

    def rotary_tables(self, x: Value, width: int, cast: bool = True) -> tuple[Value, Value]:
        """cos and sin: computed in fp32 for one sequence, cast to the hidden states' dtype."""
        size = Size(width, 0, 1)
        half = self.constant(size.per(2), "fp32")
        angles = self.constant(size, "fp32")
        cos, sin = self.constant(size, "fp32"), self.constant(size, "fp32")
        del half, angles
        if not cast:
            return cos, sin
        return self.to(cos, x.dtype), self.to(sin, x.dtype)

    def fused_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        mask: Value | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
    ) -> Value:
        """sdpa and flash_attention_2, merged heads: the kernel that _fused_sdp_choice takes.

        transformers' sdpa_attention_forward repeats keys and values itself when there is a mask.
        Only the plain products keep a mask for `dropout`; the fused kernels keep a seed.
        """
        groups = heads // kv_heads
        value_dim = value_dim or head_dim
        if mask is not None:
            one = kv_heads == 1
            k, v, kv_heads = k.expand(groups, view=one), v.expand(groups, view=one), heads
            if mask.dtype == "bool":  # convert_boolean_attn_mask, attention.cpp
                mask = self.constant(mask.size, self.autocast or q.dtype)
        half = (self.autocast or q.dtype) != "fp32" and head_dim <= FUSED_MAX_HEAD
        if self.policy.attention != "flash_attention_2" and half and self.policy.cudnn:
            out = self.cudnn(q, k, v, mask, heads, kv_heads, (head_dim, value_dim))
            return out if out.strided else self.clone(out)
        if self.policy.attention == "flash_attention_2" or (
            half and mask is None and value_dim == head_dim
        ):
            out = self.flash(q, k, v, heads, kv_heads, head_dim)
            return out if out.strided else self.clone(out)
        if kv_heads == heads:
            return self.efficient(q, k, v, mask, heads, value_dim)
        return self.clone(self.math(q, k, v, heads, kv_heads, value_dim, dropout))

    # -- embedding, inputs and loss -----------------------------------------------------------
    def embedding(self, name: str, rows: int, width: int, indices: Value | None = None) -> Value:
        """nn.Embedding: saves its indices (None: input_ids); backward is dense, the whole table."""
        weight = self.parameter(f"{name}.weight", rows, width)
        out = indices.size.times(width) if indices is not None else Size(width, 1, 1)
        dtype = weight.dtype

        def compute() -> Value:
            self.works("moves", out, 2 * ITEMSIZE[dtype])
            return self.new(out, dtype)

        return self.record(
            (weight,),
            lambda: (indices,),
            compute,
            lambda grad: self.new(Size(rows * width), dtype),
        )

    def position_ids(self, batched: bool = False) -> Value:
        """int64 positions of one sequence, or of every one."""
        return self.constant(Size(1, int(batched), 1), "int64")

    def require_grad(self, x: Value) -> Value:
        """enable_input_require_grads: the embedding's output becomes a leaf with a gradient.

        Its AccumulateGrad holds the tensor itself for as long as the graph lives.
        """
        if x.node is None:
            x.node = Node(LEAF_ORDER, [], (x.storage,), lambda grad: ())
        return x

    def table(self, count: int, dtype: str, positions: bool = False) -> Value:
        """A constant of `count` elements, in all or for every position."""
        return self.constant(Size(count, 0, int(positions)), dtype)

    def loss(self, logits: Value, vocabulary: int) -> Value:
        """ForCausalLMLoss: logits.float(), then cross_entropy = log_softmax + nll_loss."""
        logits = self.float(logits)
        tokens = logits.size.per(vocabulary)
        labels = self.constant(tokens, "int64")
        last: Value | None = self.constant(Size(1), "int64")  # a label more, which says nothing
        if not self.policy.single_sequence:
            labels = self.constant(tokens, "int64")  # [..., 1:].contiguous() copies several rows
            last = None
        return self.cross_entropy(logits, labels, last)

    def cross_entropy(self, logits: Value, labels: Value, more: Value | None = None) -> Value:
        """log_softmax, then nll_loss: it saves the labels, and the sum of their weights."""
        size = logits.size

        def row_by_row(*_: Value) -> Value:
            # forward: the maximum, the sum, the result; backward: the sum, then the result
            self.works("moves", size, 4 * ITEMSIZE["fp32"])
            return self.new(size, "fp32")

        log_probabilities = self.record((logits,), lambda: (), row_by_row, row_by_row)
        self.save_output(log_probabilities)

        def pick() -> Value:
            self.works("moves", Size(1), ITEMSIZE["fp32"])
            return self.new(Size(1), "fp32")

        def backward(grad: Value) -> Value:
            self.works("moves", size, ITEMSIZE["fp32"])
            return self.new(size, "fp32")

        saved = lambda: (log_probabilities, labels, more)  # noqa: E731
        out = self.record((log_probabilities,), saved, pick, backward)
        if out.node is not None:
            out.node.saved = [*out.node.saved, *self.pack([self.new(Size(1), "fp32").storage])]
        return out
