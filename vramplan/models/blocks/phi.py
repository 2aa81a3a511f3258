"""Phi (1, 1.5, 2): one norm for attention and feed-forward, which run side by side."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Decoder, Tensor


class PartialRotary(Decoder):
    """Rotary positions on the leading dimensions of a head only."""

    def leading(self, x: Tensor) -> Tensor:
        """x[..., :rotary_dim]; x itself when that is all of it."""
        if self.arch.rotary_dim == self.arch.head_dim:
            return x
        return x.slice(self.arch.rotary_dim, self.arch.head_dim)

    def passed_on(self, x: Tensor) -> Tensor:
        """x[..., rotary_dim:]; may be empty."""
        return x.slice(self.arch.head_dim - self.arch.rotary_dim, self.arch.head_dim)


class Phi(PartialRotary):
    """models/phi/modeling_phi.py"""

    norm_name = "model.final_layernorm"

    def embed(self) -> Tensor:
        x = self.token_embedding()
        x = x.dropout(self.arch.dropouts.embedding)
        self.held = (x,)
        return x

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def block(self, x: Tensor, layer: int) -> Tensor:
        name, dropout = f"{self.layers_name}.{layer}", self.arch.dropouts.residual
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        attn_outputs = self.attention(x, f"{name}.self_attn")
        attn_outputs = attn_outputs.dropout(dropout)
        feed_forward = self.mlp(x, f"{name}.mlp").dropout(dropout)
        x = attn_outputs + feed_forward + residual
        return x

    def mlp(self, x: Tensor, name: str) -> Tensor:
        arch, g = self.arch, self.g
        x = g.linear(x, f"{name}.fc1", arch.hidden_size, arch.intermediate_size, True)
        x = self.activation(x)
        x = g.linear(x, f"{name}.fc2", arch.intermediate_size, arch.hidden_size, True)
        return x

    def attention(self, x: Tensor, name: str) -> Tensor:
        arch, g = self.arch, self.g
        query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        q = self.heads(g.linear(x, f"{name}.q_proj", arch.hidden_size, query, True))
        k = self.heads(g.linear(x, f"{name}.k_proj", arch.hidden_size, key, True))
        v = self.heads(g.linear(x, f"{name}.v_proj", arch.hidden_size, key, True))
        if arch.qk_norm:
            q = self.norm(q, f"{name}.q_layernorm", arch.head_dim)
            k = self.norm(k, f"{name}.k_layernorm", arch.head_dim)
        q_rot, q_pass = self.leading(q), self.passed_on(q)
        k_rot, k_pass = self.leading(k), self.passed_on(k)
        q_rot, k_rot = self.rotary(q_rot, k_rot)
        q = g.cat((q_rot, q_pass))
        k = g.cat((k_rot, k_pass))
        out = self.attend(q, k, v)
        out = g.linear(out, f"{name}.dense", query, arch.hidden_size, True)
        return out
