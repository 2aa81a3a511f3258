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
        arch, g = self.arch, self.g
        query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        bias = arch.attention_bias
        q = self.heads(g.linear(x, f"{name}.q_proj", arch.hidden_size, query, bias))
        k = self.heads(g.linear(x, f"{name}.k_proj", arch.hidden_size, key, bias))
        v = self.heads(g.linear(x, f"{name}.v_proj", arch.hidden_size, key, bias))
        q, k = self.rotary(q, k)
        out = self.attend(q, k, v)
        out = g.linear(out, f"{name}.o_proj", query, arch.hidden_size, arch.output_bias)
        return out
