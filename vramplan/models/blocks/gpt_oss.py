"""gpt-oss: attention sinks, alternating windows, experts with biases and interleaved gates.

The checkpoints' experts are MXFP4; what is described is the run with weights dequantized to the
recipe's dtype (transformers' Mxfp4Config(dequantize=True)), as training needs.
"""

from __future__ import annotations

from typing import ClassVar

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.moe import Mixture


class GptOss(Mixture):
    """models/gpt_oss/modeling_gpt_oss.py: no sdpa; its attention is eager."""

    former_router: ClassVar[tuple[str, ...]] = ()
    former_gate_up: ClassVar[tuple[str, ...]] = ()
    former_down: ClassVar[tuple[str, ...]] = ()
    router_name: ClassVar[str] = "router"
    biased: ClassVar[bool] = True
    transposed: ClassVar[bool] = True

    def kind(self, layer: int) -> str:
        """Both kinds allocate alike, but a mask is freed in the backward of its first layer."""
        return "sliding" if self.slides(layer) else "full"

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        full, sliding = self.g.eager_mask(x), self.g.eager_mask(x)
        return (full, sliding, *self.g.half_tables(x, self.arch.rotary_dim))

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """GptOssRMSNorm: the weight is applied in fp32."""
        width = width or self.arch.hidden_size
        weight = self.g.parameter(f"{name}.weight", width)
        before = x.dtype
        x = x.float()
        variance = x.pow().mean(width)
        x = x * (variance * 1.0).rsqrt()
        return (weight * x).to(before)

    # -- attention ----------------------------------------------------------------------------
    def attention(self, x: Tensor, name: str) -> Tensor:
        self.name = name
        return super().attention(x, name)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_embed = self.rotate(q)
        k_embed = self.rotate(k)
        return q_embed, k_embed

    def rotate(self, x: Tensor) -> Tensor:
        """_apply_rotary_emb: the tables are half a head wide."""
        _, cos, sin = self.tables
        first_half, second_half = x.split((1, 1))
        first = (first_half * cos).minus(second_half * sin)
        second = second_half * cos + first_half * sin
        return self.g.dense_cat((first, second))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.eager(q, k, v)

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arch, g = self.arch, self.g
        groups, heads = arch.heads // arch.kv_heads, arch.heads
        k_states = k.expand(groups)
        v_states = v.expand(groups)
        weights = g.scores(q, k_states, heads) * 1.0
        weights = weights + self.mask
        sinks = g.parameter(f"{self.name}.sinks", heads)
        combined = g.with_sinks(weights, sinks, heads)
        combined = g.minus_maximum(combined, heads)
        probabilities = g.wide_softmax(combined, heads)
        scores = g.without_sinks(probabilities, heads)
        weights = scores.dropout(arch.dropouts.attention).to(v_states.dtype)
        out = g.weighted(weights, v_states, heads)
        self.weights = weights
        return out.clone()

    # -- feed-forward -------------------------------------------------------------------------
    def route(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        g, experts = self.g, self.figures
        logits = g.router_logits(x, name, experts.count, self.arch.hidden_size, (), biased=True)
        top, index = g.topk(logits, experts.active, experts.count)
        scores = g.plain_softmax(top)
        return logits, scores, index

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """gate and up are clamped; (up + 1) * gate * sigmoid(gate * alpha)"""
        g = self.g
        gate, up = gate_up.slice(1, 2), gate_up.slice(1, 2)
        gate = g.clamp(gate, 1)
        up = g.clamp(up, 2)
        glu = gate * (gate * 1.0).sigmoid()
        return up.shift() * glu
