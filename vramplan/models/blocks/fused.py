"""Families whose projections are fused: Phi-3, GLM, GLM-4."""

from __future__ import annotations

from types import MappingProxyType

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.llama import Llama
from vramplan.models.blocks.windowed import Windowed


def fused_mlp(block: Llama, x: Tensor, name: str) -> Tensor:
    """Phi3MLP, GlmMLP, Glm4MLP: gate and up projection in one."""
    g, hidden, width = block.g, block.arch.hidden_size, block.arch.intermediate_size
    up = g.linear(x, f"{name}.gate_up_proj", hidden, 2 * width)
    gate, up = up.split([width, width])
    up = g.tailed(up * block.activation(gate), block.arch.deviation)
    return g.linear(up, f"{name}.down_proj", width, hidden)


class Phi3(Windowed):
    """models/phi3/modeling_phi3.py: q, k and v in one projection too; part of a head is rotated."""

    declared_first = MappingProxyType({"o_proj": "qkv_proj"})

    def block(self, x: Tensor, layer: int) -> Tensor:
        name, p = f"{self.layers_name}.{layer}", self.arch.dropouts.residual
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        x = self.attention(x, f"{name}.self_attn")
        x = residual + x.dropout(p)
        residual = x
        x = self.norm(x, f"{name}.post_attention_layernorm")
        x = self.mlp(x, f"{name}.mlp")
        x = residual + x.dropout(p)
        return x

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return fused_mlp(self, x, name)

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        arch = self.arch
        total = arch.heads + 2 * arch.kv_heads
        width = total * arch.head_dim
        qkv = self.g.linear(x, f"{name}.qkv_proj", arch.hidden_size, width)
        q = qkv.slice(arch.heads, total)
        k = qkv.slice(arch.kv_heads, total)
        v = qkv.slice(arch.kv_heads, total)
        return self.heads(q), self.heads(k), self.heads(v)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        _, cos, sin = self.tables
        cat, part, whole = self.g.cat, self.arch.rotary_dim, self.arch.head_dim
        q_rot, q_pass = q.slice(part, whole), q.slice(whole - part, whole)
        k_rot, k_pass = k.slice(part, whole), k.slice(whole - part, whole)
        q_embed = cat(((q_rot * cos) + (self.rotate_half(q_rot) * sin), q_pass))
        k_embed = cat(((k_rot * cos) + (self.rotate_half(k_rot) * sin), k_pass))
        return q_embed, k_embed


class Glm(Llama):
    """models/glm/modeling_glm.py: half of a head is rotated, with interleaved positions."""

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return fused_mlp(self, x, name)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        _, cos, sin = self.tables
        g, part, whole = self.g, self.arch.rotary_dim, self.arch.head_dim
        cos = g.constant(cos.size, cos.dtype)  # repeat_interleave of a half
        sin = g.constant(sin.size, sin.dtype)
        q_rot, q_pass = q.slice(part, whole), q.slice(whole - part, whole)
        k_rot, k_pass = k.slice(part, whole), k.slice(whole - part, whole)
        q_embed = (q_rot * cos) + (self.rotate_half(q_rot) * sin)
        k_embed = (k_rot * cos) + (self.rotate_half(k_rot) * sin)
        q_embed = g.cat((q_embed, q_pass))
        k_embed = g.cat((k_embed, k_pass))
        return q_embed, k_embed


class Glm4(Glm):
    """models/glm4/modeling_glm4.py: norms before and after both sublayers."""

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        x = self.attention(x, f"{name}.self_attn")
        x = self.norm(x, f"{name}.post_self_attn_layernorm")
        x = residual + x
        residual = x
        x = self.norm(x, f"{name}.post_attention_layernorm")
        x = self.mlp(x, f"{name}.mlp")
        x = self.norm(x, f"{name}.post_mlp_layernorm")
        x = residual + x
        return x
