"""Families that differ from llama in norms, scales, masks or positions."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.llama import Llama
from vramplan.models.blocks.windowed import Windowed


class Mistral(Windowed):
    """models/mistral/modeling_mistral.py: a window in every layer, or in none."""


class Qwen2(Windowed):
    """models/qwen2/modeling_qwen2.py: biases on q, k and v; a window in the upper layers."""


class Qwen3(Windowed):
    """models/qwen3/modeling_qwen3.py: RMS norms over the heads of queries and keys."""

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        arch = self.arch
        q = self.project_one(x, f"{name}.q_proj", arch.heads)
        q = self.heads(self.norm(q, f"{name}.q_norm", arch.head_dim))
        k = self.project_one(x, f"{name}.k_proj", arch.kv_heads)
        k = self.heads(self.norm(k, f"{name}.k_norm", arch.head_dim))
        v = self.heads(self.project_one(x, f"{name}.v_proj", arch.kv_heads))
        return q, k, v


class SmolLM3(Windowed):
    """models/smollm3/modeling_smollm3.py: every fourth layer has no rotary positions."""

    rotates = True  # in the layer that runs

    def kind(self, layer: int) -> str:
        return super().kind(layer) + (" nope" if self.unrotated(layer) else "")

    def unrotated(self, layer: int) -> bool:
        kinds = self.arch.layer_kinds
        return bool(kinds) and "nope" in kinds[layer]

    def run(self, x: Tensor, layer: int, tables: tuple[Tensor, ...]) -> Tensor:
        self.rotates = not self.unrotated(layer)
        return super().run(x, layer, tables)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotary(q, k) if self.rotates else (q, k)


class Granite(Llama):
    """models/granite/modeling_granite.py: embedding, residual and logits are scaled."""

    def embed(self) -> Tensor:
        x = self.token_embedding()
        x = x * 1.0
        self.held = (x,)
        return x

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        x = self.attention(x, f"{name}.self_attn")
        x = residual + x * 1.0
        residual = x
        x = self.norm(x, f"{name}.post_attention_layernorm")
        x = self.mlp(x, f"{name}.mlp")
        x = residual + x * 1.0
        return x

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        return logits / 1.0


class Olmo(Llama):
    """models/olmo/modeling_olmo.py: layer norms without weights, positions in fp32, clipping."""

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        before = x.dtype
        return self.g.layer_norm(x.float(), None, None, width or self.arch.hidden_size).to(before)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = self.g.causal_mask(x)
        return (mask, *self.g.rotary_tables(x, self.arch.rotary_dim, cast=False))

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        arch = self.arch
        q = self.project_one(x, f"{name}.q_proj", arch.heads)
        k = self.project_one(x, f"{name}.k_proj", arch.kv_heads)
        v = self.project_one(x, f"{name}.v_proj", arch.kv_heads)
        if arch.figure("clips"):
            q, k, v = q.clamp_in_place(), k.clamp_in_place(), v.clamp_in_place()
        return self.heads(q), self.heads(k), self.heads(v)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q_type, k_type = q.dtype, k.dtype
        q_embed, k_embed = super().rotary(q, k)
        return q_embed.to(q_type), k_embed.to(k_type)


class Olmo2(Olmo):
    """models/olmo2/modeling_olmo2.py: norms after the sublayers and over queries and keys."""

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """Olmo2RMSNorm: the weight is applied in fp32."""
        width = width or self.arch.hidden_size
        weight = self.g.parameter(f"{name}.weight", width)
        before = x.dtype
        x = x.float()
        variance = x.pow().mean(width)
        x = x * (variance * 1.0).rsqrt()
        return (weight * x).to(before)

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.attention(x, f"{name}.self_attn")
        x = self.norm(x, f"{name}.post_attention_layernorm")
        x = residual + x
        residual = x
        x = self.mlp(x, f"{name}.mlp")
        x = self.norm(x, f"{name}.post_feedforward_layernorm")
        x = residual + x
        return x

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        arch = self.arch
        q = self.project_one(x, f"{name}.q_proj", arch.heads)
        q = self.norm(q, f"{name}.q_norm", arch.heads * arch.head_dim)
        k = self.project_one(x, f"{name}.k_proj", arch.kv_heads)
        k = self.norm(k, f"{name}.k_norm", arch.kv_heads * arch.head_dim)
        v = self.project_one(x, f"{name}.v_proj", arch.kv_heads)
        return self.heads(q), self.heads(k), self.heads(v)
