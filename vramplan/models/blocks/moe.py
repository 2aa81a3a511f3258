"""Mixtures of experts on llama's frame: Mixtral, Qwen3-MoE, OLMoE.

What the experts themselves take is in memory/experts.py.
"""

from __future__ import annotations

from typing import ClassVar

from vramplan.models.architecture import Experts
from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.llama_kin import Qwen3
from vramplan.models.blocks.windowed import Windowed
from vramplan.models.stack import Stack


class Mixture(Windowed):
    """A decoder whose layers, or most of them, have experts in place of the feed-forward.

    `former` are the names that a checkpoint of transformers 4 had for the router and for what
    gate_up_proj and down_proj hold now: peft translates targets that name them, `all-linear`
    included, to the parameters (peft 0.21 utils/transformers_weight_conversion.py). A dense
    feed-forward's projections of the same names are then left out.
    """

    former_router: ClassVar[tuple[str, ...]] = ("gate",)
    former_gate_up: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj")
    former_down: ClassVar[tuple[str, ...]] = ("down_proj",)
    router_name: ClassVar[str] = "gate"
    biased: ClassVar[bool] = False
    transposed: ClassVar[bool] = False

    @property
    def figures(self) -> Experts:
        experts = self.arch.experts
        assert experts is not None
        return experts

    def dense(self, layer: int) -> bool:
        """Whether a layer has a plain feed-forward."""
        return layer < self.figures.first_dense or layer in self.figures.dense_layers

    def kind(self, layer: int) -> str:
        return super().kind(layer) + (" dense" if self.dense(layer) else "")

    def block(self, x: Tensor, layer: int) -> Tensor:
        self.layer = layer
        return super().block(x, layer)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        if self.dense(self.layer):
            return self.plain_mlp(x, name, self.arch.intermediate_size)
        return self.mixture(x, name)

    def plain_mlp(self, x: Tensor, name: str, width: int) -> Tensor:
        """down(act(gate(x)) * up(x)), never adapted."""
        g, hidden, bias = self.g, self.arch.hidden_size, self.arch.mlp_bias
        return g.linear(
            g.tailed(
                self.activation(
                    g.linear(x, f"{name}.gate_proj", hidden, width, bias, adaptable=False)
                )
                * g.linear(x, f"{name}.up_proj", hidden, width, bias, adaptable=False),
                self.arch.deviation,
            ),
            f"{name}.down_proj",
            width,
            hidden,
            bias,
            adaptable=False,
        )

    def mixture(self, x: Tensor, name: str) -> Tensor:
        _logits, scores, index = self.route(x, f"{name}.{self.router_name}")
        x = self.g.experts(x, index, scores, self.stack(f"{name}.experts"), self.apply_gate)
        return x

    def stack(self, name: str) -> Stack:
        experts = self.figures
        return Stack(
            name=name,
            count=experts.count,
            active=experts.active,
            hidden=self.arch.hidden_size,
            width=experts.width,
            biased=self.biased,
            transposed=self.transposed,
            former_gate_up=self.former_gate_up,
            former_down=self.former_down,
        )

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """_default_apply_gate: act(gate) * up"""
        gate, up = gate_up.split((1, 1))
        return self.activation(gate) * up

    def router_logits(self, x: Tensor, name: str, wide: bool = False) -> Tensor:
        experts = self.figures
        return self.g.router_logits(
            x, name, experts.count, self.arch.hidden_size, self.former_router, wide
        )

    def route(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the chosen experts' weights, their indices."""
        raise NotImplementedError


class Mixtral(Mixture):
    """models/mixtral/modeling_mixtral.py: the weights of experts stay fp32."""

    former_gate_up: ClassVar[tuple[str, ...]] = ("w1", "w3")
    former_down: ClassVar[tuple[str, ...]] = ("w2",)

    def route(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        g, experts = self.g, self.figures
        logits = self.router_logits(x, name)
        probabilities = logits.float().softmax("fp32")
        top, index = g.topk(probabilities, experts.active, experts.count)
        top = g.divide_(top, g.total(top, experts.active))
        return logits, top, index


class SoftmaxRouter(Mixture):
    """Probabilities in fp32, weights cast back to the logits' dtype (Qwen3-MoE, OLMoE)."""

    def route(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        g, experts = self.g, self.figures
        logits = self.router_logits(x, name)
        probabilities = logits.softmax("fp32")
        top, index = g.topk(probabilities, experts.active, experts.count)
        if self.arch.figure("normalizes"):
            top = g.divide_(top, g.total(top, experts.active))
        top = top.to(logits.dtype)
        return logits, top, index


class Qwen3Moe(SoftmaxRouter, Qwen3):
    """models/qwen3_moe/modeling_qwen3_moe.py"""


class Olmoe(SoftmaxRouter):
    """models/olmoe/modeling_olmoe.py: norms over all queries and all keys, clipping."""

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        arch = self.arch
        per_head = arch.hidden_size // arch.heads
        q = self.project_one(x, f"{name}.q_proj", arch.heads)
        q = self.norm(q, f"{name}.q_norm", arch.hidden_size)
        k = self.project_one(x, f"{name}.k_proj", arch.kv_heads)
        k = self.norm(k, f"{name}.k_norm", per_head * arch.kv_heads)
        v = self.project_one(x, f"{name}.v_proj", arch.kv_heads)
        if arch.figure("clips"):
            q, k, v = q.clamp_in_place(), k.clamp_in_place(), v.clamp_in_place()
        return self.heads(q), self.heads(k), self.heads(v)
