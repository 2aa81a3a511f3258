"""Mixtures of experts: routing, and all experts' products at once (`grouped_mm`).

transformers 5.17 keeps a layer's experts in two 3-D parameters and, unless told otherwise, runs
`grouped_mm_experts_forward` of integrations/moe.py (modeling_utils.py,
get_correct_experts_implementation): every token is copied once for each expert it visits and the
copies are sorted by expert, so the rows are tokens x top-k exactly, whatever the router answers.
How they fall to the experts decides nothing here: the kernels take one buffer for all experts (bf16
on sm_90) or one product after the other into the same buffer (_grouped_mm_fallback: fp32, fp16,
earlier cards). What is assumed is that no expert-parallel sentinel is routed to.

Experts are no nn.Linear: bitsandbytes leaves them alone, and prepare_model_for_kbit_training then
upcasts them to fp32. torch's grouped_mm is on none of autocast's lists: it computes in the
weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vramplan.memory.latent import Latent
from vramplan.memory.values import Size, Value

if TYPE_CHECKING:
    from vramplan.models.stack import Stack

SORT_ARRAYS = 6
"""int64 arrays, one number a row, inside index_put_ with accumulate (aten/src/ATen/native/cuda/
Indexing.cu, index_put_with_sort_kernel): linear, sorted and original indices, the range that is
sorted along, and the radix sort's second buffers of keys and of values."""


class Experts(Latent):
    """Routing and the experts' forward, statement by statement."""

    # -- routing ------------------------------------------------------------------------------
    def router_logits(
        self,
        x: Value,
        name: str,
        experts: int,
        hidden: int,
        former: Sequence[str],
        wide: bool = False,
        biased: bool = False,
    ) -> Value:
        """F.linear with a parameter of the router's own, never quantized; `wide`: in fp32.

        Autocast takes the fp32 copies back to 16 bits; the call holds them until it returns.
        """
        weight = self.parameter(f"{name}.weight", experts, hidden)
        bias = self.parameter(f"{name}.bias", experts) if biased else None
        if self.policy.adapts_parameter(former):
            weight = self.adapted_matrix(weight, name, experts, hidden)
        copies = [self.to(v, "fp32") if wide else v for v in (x, weight)]
        return self.dense(copies[0], copies[1], bias, hidden, experts)

    def adapted_matrix(self, weight: Value, name: str, rows: int, columns: int) -> Value:
        """peft ParamWrapper on a matrix: weight + (B @ A) * scaling, twice (parametrize checks)."""
        rank = self.policy.rank or 0
        down = self.adapter(f"{name}.lora_A.weight", rank * columns)
        up = self.adapter(f"{name}.lora_B.weight", rows * rank)
        delta = self.matmul(up, down, Size(rows * columns)) * 1.0
        delta = self.to(delta, weight.dtype)
        weight + delta
        return weight + delta

    def topk(self, x: Value, k: int, width: int) -> tuple[Value, Value]:
        """topk: saves indices; value_selecting_reduction_backward scatters into zeros."""
        size, dtype = x.size, x.dtype
        chosen = size.per(width).times(k)
        indices: list[Value] = []

        def compute() -> Value:
            values = self.new(chosen, dtype)
            indices.append(self.new(chosen, "int64"))
            return values

        values = self.record((x,), lambda: (), compute, lambda grad: self.new(size, dtype))
        if values.node is not None:
            values.node.saved = [*values.node.saved, *self.pack([indices[0].storage])]
        return values, indices[0]

    def gather(self, x: Value, index: Value) -> Value:
        """gather: saves index; backward adds into zeros of the full size."""
        size, dtype = x.size, x.dtype
        return self.record(
            (x,),
            lambda: (index,),
            lambda: self.new(index.size, dtype),
            lambda grad: self.new(size, dtype),
        )

    def total(self, x: Value, count: int) -> Value:
        """sum over `count` numbers (fp32 under autocast); backward expands, without a copy."""
        size, dtype = x.size, "fp32" if self.autocast else x.dtype

        def backward(grad: Value) -> Value:
            return Value(self, grad.storage, size, grad.dtype, view=True)

        return self.record((x,), lambda: (), lambda: self.new(size.per(count), dtype), backward)

    def divide_(self, x: Value, divisor: Value) -> Value:
        """div_: in place, so it saves a copy of x for the divisor's gradient."""
        size, dtype, divisor_dtype = x.size, x.dtype, divisor.dtype
        before: list[Value] = []

        def compute() -> Value:
            return Value(self, x.storage, size, dtype)

        def saved() -> tuple[Value, Value]:
            before.append(self.new(size, dtype))
            return before[0], divisor

        def backward(grad: Value) -> tuple[Value, Value]:
            first = self.new(size, divisor_dtype)
            ratio = self.new(size, divisor_dtype)
            second = self.new(size, divisor_dtype)
            del ratio
            negative = self.new(size, grad.dtype)
            last = self.new(size, divisor_dtype)
            del negative, second
            return first, last

        out = self.record((x, divisor), saved, compute, backward)
        before.clear()
        return out

    def corrected(self, scores: Value, experts: int) -> Value:
        """scores + e_score_correction_bias, a buffer that stays fp32."""
        return scores + Value(self, None, Size(experts), "fp32")

    def limit_groups(self, scores: Value, experts: int, groups: int, kept: int, best: int) -> Value:
        """Scores outside the `kept` best groups are filled; a group's score is its `best` best."""
        per_group = experts // groups
        group_scores = self.topk(scores, best, per_group)[0]
        if best > 1:
            group_scores = self.total(group_scores, best)
        group_index = self.topk(group_scores, kept, groups)[1]
        group_mask = self.constant(group_scores.size, "fp32")
        score_mask = self.constant(scores.size, "fp32")
        mask = self.constant(scores.size, "bool")
        mask = self.constant(scores.size, "bool")
        scores = self.masked_fill(scores, mask)
        del group_index, group_mask, score_mask
        return scores

    # -- rows ---------------------------------------------------------------------------------
    def take(self, x: Value, index: Value, size: Size) -> Value:
        """x[index]: saves index; backward adds into zeros, sorting the indices."""
        whole, dtype, rows = x.size, x.dtype, index.size

        def backward(grad: Value) -> Value:
            self.works("scatter", size)
            out = self.new(whole, dtype)
            work = [self.new(rows, "int64") for _ in range(SORT_ARRAYS)]
            del work
            return out

        return self.record((x,), lambda: (index,), lambda: self.new(size, dtype), backward)

    def masked_fill_(self, x: Value, mask: Value) -> Value:
        """masked_fill_: in place; saves the mask; backward masks a copy of the gradient."""
        return self.record(
            (x,),
            lambda: (mask,),
            lambda: Value(self, x.storage, x.size, x.dtype),
            lambda grad: self.new(grad.size, grad.dtype),
        )

    def grouped_mm(self, x: Value, weight: Value, offsets: Value, n_in: int, n_out: int) -> Value:
        """_grouped_mm: saves weight for x and x for weight; the weight's gradient is made first."""
        x = self.to(x, weight.dtype)
        need, dtype = (x.requires_grad, weight.requires_grad), x.dtype
        sizes = (x.size, weight.size)

        figures = (x.size.per(n_in), n_in, n_out, dtype)
        count = weight.size.numel // (n_in * n_out)

        def compute() -> Value:
            self.works("grouped product", *figures, "forward", count)
            return self.new(size, dtype)

        def backward(grad: Value) -> tuple[Value | None, ...]:
            for needed, of in zip(need, ("input", "weight"), strict=True):
                if needed:
                    self.works("grouped product", *figures, of, count)
            for_weight = self.new(sizes[1], dtype) if need[1] else None
            for_x = self.new(sizes[0], dtype) if need[0] else None
            return for_x, for_weight

        def saved() -> tuple[Value | None, ...]:
            return weight if need[0] else None, offsets, x if need[1] else None

        size = x.size.per(n_in).times(n_out)
        return self.record((x, weight), saved, compute, backward)

    def mix(self, x: Value, active: int) -> Value:
        """view(tokens, top-k, hidden).sum(dim=1): backward makes the rows again, densely."""
        size, dtype = x.size, x.dtype
        out = "fp32" if self.autocast else dtype
        return self.record(
            (x,),
            lambda: (),
            lambda: self.new(size.per(active), out),
            lambda grad: self.new(size, dtype),
        )

    # -- the experts --------------------------------------------------------------------------
    def experts(
        self, x: Value, index: Value, scores: Value, stack: Stack, gate: Callable[[Value], Value]
    ) -> Value:
        """The experts' module: peft's wrappers (down_proj outermost) around grouped_mm's forward.

        A wrapper folds the adapter into a copy of all experts' weights, which the product saves.
        Registering it computes the copy once for its checks, and once for use.
        """
        cached: dict[str, Value] = {}  # parametrize.cached(): until the outermost wrapper returns
        factors = {}
        if self.policy.adapts_parameter(stack.former_down):
            factors["down_proj"] = self.expert_factors(stack, "down_proj")
            self.folded(stack, "down_proj", factors)
        if self.policy.adapts_parameter(stack.former_gate_up):
            factors["gate_up_proj"] = self.expert_factors(stack, "gate_up_proj")
            self.folded(stack, "gate_up_proj", factors)

        def weight(part: str) -> Value:
            if part not in factors:
                return self.expert_weight(stack, part)
            cached[part] = self.folded(stack, part, factors)
            return cached[part]

        return self.grouped_forward(x, index, scores, stack, gate, weight)

    def expert_weight(self, stack: Stack, part: str) -> Value:
        shape = stack.shapes[part]
        return self.parameter(f"{stack.name}.{part}", *shape)

    def expert_factors(self, stack: Stack, part: str) -> tuple[Value, Value]:
        """ParamWrapper.get_delta_factors: B and A of every expert in the weight's dtype.

        gate_up_proj holds two former projections, so its rank is twice the recipe's. B's gradient
        is copied once more on its way back (it was reshaped and permuted).
        """
        count, n_out, n_in = stack.shapes[part]
        rank = (self.policy.rank or 0) * len(stack.former[part])
        name, dtype = f"{stack.name}.{part}", self.policy.weight_dtype
        down = self.adapter(f"{name}.lora_A.weight", count * rank * n_in).alias()
        up = self.split_heads(self.adapter(f"{name}.lora_B.weight", n_out * rank * count))
        return self.to(up, dtype), self.to(down, dtype)

    def folded(self, stack: Stack, part: str, factors: dict[str, tuple[Value, Value]]) -> Value:
        """_LoraFactorsProxy: baddbmm(W, B, A, alpha=scaling), outside autocast.

        Each factor's gradient is a product and its scaled copy. B lies so in memory that cuBLAS
        is given a copy of it.
        """
        weight = self.expert_weight(stack, part)
        up, down = factors[part]
        sizes, dtype = (weight.size, up.size, down.size), weight.dtype
        trains = weight.requires_grad

        shape = stack.shapes[part]
        rank = up.size.numel // (shape[0] * shape[1])

        def compute() -> Value:
            self.works("folded product", *shape, rank, dtype)
            out = self.new(sizes[0], dtype)
            work = self.new(sizes[1], dtype)
            del work
            return out

        def backward(grad: Value) -> tuple[Value | None, ...]:
            for _ in range(2):
                self.works("folded product", *shape, rank, dtype)
            product = self.new(sizes[1], dtype)
            for_up = self.new(sizes[1], dtype)
            del product
            product, work = self.new(sizes[2], dtype), self.new(sizes[1], dtype)
            del work
            for_down = self.new(sizes[2], dtype)
            del product
            return grad if trains else None, for_up, for_down

        return self.record((weight, up, down), lambda: (up, down), compute, backward)

    def grouped_forward(
        self,
        x: Value,
        index: Value,
        scores: Value,
        stack: Stack,
        gate: Callable[[Value], Value],
        weight: Callable[[str], Value],
    ) -> Value:
        """integrations/moe.py grouped_mm_experts_forward"""
        active, hidden, width = stack.active, stack.hidden, stack.width
        rows = Size(active, 1, 1)
        expert_ids, perm = self.constant(rows, "int64"), self.constant(rows, "int64")
        selected = self.take(x, self.constant(rows, "int64"), rows.times(hidden))
        sample_weights = self.take(scores, perm, rows)
        histogram = self.constant(rows, "int32")
        counts = self.constant(Size(stack.count), "int32")
        offsets = self.constant(Size(stack.count), "int32")
        sentinel = self.constant(rows, "bool")
        weights = weight("gate_up_proj")
        bias = self.expert_bias(stack, "gate_up_proj", expert_ids, rows)
        selected = self.masked_fill_(selected, sentinel)
        out = self.grouped_mm(selected, weights, offsets, hidden, 2 * width)
        if bias is not None:
            out = self.add_into(out, bias)
        out = self.masked_fill(out, sentinel)
        out = gate(out)
        weights = weight("down_proj")
        bias = self.expert_bias(stack, "down_proj", expert_ids, rows)
        out = self.grouped_mm(out, weights, offsets, width, hidden)
        if bias is not None:
            out = self.add_into(out, bias)
        out = self.masked_fill(out, sentinel)
        weighted = out * sample_weights
        inverse = self.constant(rows, "int64")
        weighted = self.take(weighted, inverse, weighted.size)
        final = self.mix(weighted, active)
        del histogram, counts
        return self.to(final, x.dtype)

    def expert_bias(self, stack: Stack, part: str, index: Value, rows: Size) -> Value | None:
        """bias[expert_ids]: a row of biases for every row."""
        if not stack.biased:
            return None
        n_out = stack.outputs[part]
        bias = self.parameter(f"{stack.name}.{part}_bias", stack.count, n_out)
        return self.take(bias, index, rows.times(n_out))
