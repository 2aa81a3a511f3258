"""Llama and the families that differ from it in a line or two."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Decoder, Tensor


class Llama(Decoder):
    """models/llama/modeling_llama.py"""

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        x = self.attention(x, f"{name}.self_attn")
        x = residual + x
        residual = x
        x = self.norm(x, f"{name}.post_attention_layernorm")
        x = self.mlp(x, f"{name}.mlp")
        x = residual + x
        return x

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.gated_mlp(x, name)

    def attention(self, x: Tensor, name: str) -> Tensor:
        arch = self.arch
        q, k, v = self.project(x, name)
        q, k = self.rotary(q, k)
        out = self.attend(q, k, v)
        width = arch.heads * arch.head_dim
        out = self.g.linear(out, f"{name}.o_proj", width, arch.hidden_size, arch.output_bias)
        return out

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, heads before tokens."""
        q = self.heads(self.project_one(x, f"{name}.q_proj", self.arch.heads))
        k = self.heads(self.project_one(x, f"{name}.k_proj", self.arch.kv_heads))
        v = self.heads(self.project_one(x, f"{name}.v_proj", self.arch.kv_heads))
        return q, k, v

    def project_one(self, x: Tensor, name: str, heads: int) -> Tensor:
        arch = self.arch
        width = heads * arch.head_dim
        return self.g.linear(x, name, arch.hidden_size, width, arch.attention_bias)
