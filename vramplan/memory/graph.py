"""The modules that descriptions are written in: linear (with LoRA and quantization), embedding.

Each method mirrors the forward of the library's module, so its variables live as long as there.
Sources: peft 0.21 tuners/lora/{layer,bnb}.py; bitsandbytes 0.50 autograd/_functions.py,
nn/modules.py, backends/cuda/ops.py; transformers 5.17 loss/loss_utils.py.
"""

from __future__ import annotations

from vramplan.memory.attention import Attention
from vramplan.memory.precision import Policy
from vramplan.memory.tape import LEAF_ORDER, Node, Parameter, Size, Value

FLASH_MAX_HEAD = 256  # sdp_utils.cpp, check_head_dim_size_flash
ABSMAX_BLOCK = 64  # 4-bit weights share an absmax in blocks of 64 (bitsandbytes' default)


class Graph(Attention):
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
    ) -> Value:
        """nn.Linear or Conv1D under the policy: plain, quantized, with or without an adapter."""
        policy = self.policy
        quantized = policy.quantization if quantizable else None
        if not adaptable or not policy.adapts(name):
            return self.base_linear(x, name, n_in, n_out, bias, quantized)
        if quantized is None:
            return self.lora_linear(x, name, n_in, n_out, bias)
        return self.lora_quantized(x, name, n_in, n_out, bias, quantized)

    def base_linear(
        self, x: Value, name: str, n_in: int, n_out: int, bias: bool, quantized: str | None
    ) -> Value:
        offset = self.parameter(f"{name}.bias", n_out) if bias else None
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

    def lora_linear(self, x: Value, name: str, n_in: int, n_out: int, bias: bool) -> Value:
        """peft lora.Linear.forward: the input is cast to the adapter's dtype."""
        result = self.base_linear(x, name, n_in, n_out, bias, None)
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
            work = dequantized(dtype)
            out = self.new(size.per(n_in).times(n_out), dtype)
            del work
            return out

        def backward(grad: Value) -> tuple[Value | None, ...]:
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
        rows = size.per(n_in)

        def compute() -> Value:
            half = self.new(size, "fp16") if dtype != "fp16" else None
            quantized, scales = self.new(size, "int8"), self.new(rows, "fp32")
            absolute = self.new(size, "fp16")
            outliers = self.new(size, "bool")
            del absolute
            del outliers, half
            accumulated = self.new(rows.times(n_out), "int32")
            out = self.new(rows.times(n_out), "fp16")
            if dtype != "fp16":
                out = self.new(rows.times(n_out), dtype)
            del accumulated, quantized, scales
            return out

        def backward(grad: Value) -> tuple[Value | None, ...]:
            weight = self.new(Size(n_in * n_out), dtype)
            cast = self.new(grad.size, dtype) if grad.dtype != dtype else None
            out = self.new(size, dtype)
            out.view = True
            del weight, cast
            return (out,)

        inputs = (x,) if bias is None else (x, bias)
        return self.record(inputs, lambda: (), compute, backward, context=lambda: x.storage)

    # -- what descriptions call for -----------------------------------------------------------
    def activation(self, x: Value, name: str) -> Value:
        """ACT2FN: one kernel that saves its input (silu, gelu) or its output (relu, tanh)."""
        if name in ("gelu_new", "gelu_python", "gelu_fast", "quick_gelu"):
            return getattr(self, name)(x)
        return self.tanh(x) if name in ("relu", "tanh", "sigmoid") else self.silu(x)

    def head(self, x: Value, name: str, n_in: int, n_out: int, bias: str | bool) -> Value:
        """The output projection: never quantized, never adapted by all-linear."""
        self.category = "logits"
        weight = self.parameter(name, n_out, n_in)
        offset = self.parameter(bias, n_out) if isinstance(bias, str) else None
        return self.dense(x, weight, offset, n_in, n_out)

    def split_heads(self, x: Value) -> Value:
        """view + transpose: no copy forward; backward a copy unless the gradient lies so already."""
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
        rows = Size(heads * (v.size.count // heads), 1, 1)
        return self.matmul(weights, self.dense_heads(v), rows)

    def causal_mask(self, x: Value) -> Value | None:
        """masking_utils.eager_mask: batch x 1 x sequence x sequence in the hidden states' dtype.

        The fused kernels take is_causal instead: an all-ones padding mask is dropped.
        """
        if self.policy.attention != "eager":
            return None
        allowed = self.constant(Size(1, 1, 2), "bool")
        mask = self.constant(Size(1, 1, 2), x.dtype)
        del allowed
        return mask

    def rotary_tables(self, x: Value, width: int) -> tuple[Value, Value]:
        """cos and sin: computed in fp32 for one sequence, cast to the hidden states' dtype."""
        size = Size(width, 0, 1)
        half = self.constant(size.per(2), "fp32")
        angles = self.constant(size, "fp32")
        cos, sin = self.constant(size, "fp32"), self.constant(size, "fp32")
        del half, angles
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
    ) -> Value:
        """sdpa and flash_attention_2, merged heads: the kernel that _fused_sdp_choice takes.

        transformers' sdpa_attention_forward repeats keys and values itself when there is a mask.
        """
        groups = heads // kv_heads
        value_dim = value_dim or head_dim
        if mask is not None:
            k, v, kv_heads = k.expand(groups), v.expand(groups), heads
        half = (self.autocast or q.dtype) != "fp32"
        if self.policy.attention == "flash_attention_2" or (
            half and mask is None and value_dim == head_dim <= FLASH_MAX_HEAD
        ):
            return self.flash(q, k, v, heads, kv_heads, head_dim)
        if kv_heads == heads:
            return self.efficient(q, k, v, mask, heads, value_dim)
        return self.clone(self.math(q, k, v, heads, kv_heads, value_dim))

    # -- embedding, inputs and loss -----------------------------------------------------------
    def embedding(self, name: str, rows: int, width: int, size: Size | None = None) -> Value:
        """nn.Embedding: saves the indices (an input); backward is dense, of the whole table."""
        weight = self.parameter(f"{name}.weight", rows, width)
        out = size or Size(width, 1, 1)
        dtype = weight.dtype
        return self.record(
            (weight,),
            lambda: (),
            lambda: self.new(out, dtype),
            lambda grad: self.new(Size(rows * width), dtype),
        )

    def require_grad(self, x: Value) -> Value:
        """enable_input_require_grads: the embedding's output becomes a leaf with a gradient."""
        if x.node is None:
            x.node = Node(LEAF_ORDER, [], (), lambda grad: ())
        return x

    def constant(self, size: Size, dtype: str) -> Value:
        """A tensor without history: masks, position tables."""
        return self.new(size, dtype)

    def loss(self, logits: Value, vocabulary: int) -> Value:
        """ForCausalLMLoss: logits.float(), then cross_entropy = log_softmax + nll_loss."""
        logits = self.float(logits)
        tokens = logits.size.per(vocabulary)
        labels = self.constant(tokens, "int64")
        shifted = self.constant(tokens, "int64")
        del labels
        return self.cross_entropy(logits, shifted)

    def cross_entropy(self, logits: Value, labels: Value) -> Value:
        size = logits.size
        log_probabilities = self.record(
            (logits,),
            lambda: (),
            lambda: self.new(size, "fp32"),
            lambda grad: self.new(size, "fp32"),
        )
        self.save_output(log_probabilities)
        return self.record(
            (log_probabilities,),
            lambda: (log_probabilities, labels),
            lambda: self.new(Size(1), "fp32"),
            lambda grad: self.new(size, "fp32"),
        )
