"""GPT-NeoX (Pythia, Polyglot): fused projections, partial rotary positions, parallel residuals."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.phi import PartialRotary


class GPTNeoX(PartialRotary):
    """models/gpt_neox/modeling_gpt_neox.py"""

    embedding_name = "gpt_neox.embed_in"
    layers_name = "gpt_neox.layers"
    norm_name = "gpt_neox.final_layer_norm"

    def buffers(self) -> None:
        for name in ("inv_freq", "original_inv_freq"):
            self.g.buffer(f"gpt_neox.rotary_emb.{name}", self.arch.rotary_dim // 2)

    def embed(self) -> Tensor:
        x = self.token_embedding()
        self.held = (x,)
        return x.dropout(self.arch.dropouts.residual)

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def block(self, x: Tensor, layer: int) -> Tensor:
        name, dropout = f"{self.layers_name}.{layer}", self.arch.dropouts.residual
        attn_output = self.attention(self.norm(x, f"{name}.input_layernorm"), f"{name}.attention")
        attn_output = attn_output.dropout(dropout)
        if self.arch.parallel_residual:
            mlp_output = self.mlp(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            mlp_output = mlp_output.dropout(dropout)
            x = mlp_output + attn_output + x
        else:
            attn_output = attn_output + x
            normed = f"{name}.post_attention_layernorm"
            mlp_output = self.mlp(self.norm(attn_output, normed), f"{name}.mlp")
            mlp_output = mlp_output.dropout(dropout)
            x = mlp_output + attn_output
        return x

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """The call's own arguments hold the norm's output until the module returns."""
        arch, g = self.arch, self.g
        hidden = g.linear(
            x, f"{name}.dense_h_to_4h", arch.hidden_size, arch.intermediate_size, True
        )
        hidden = self.activation(hidden)
        return g.linear(
            hidden, f"{name}.dense_4h_to_h", arch.intermediate_size, arch.hidden_size, True
        )

    def attention(self, x: Tensor, name: str) -> Tensor:
        arch, g = self.arch, self.g
        hidden, bias = arch.hidden_size, arch.attention_bias
        qkv = self.heads(g.linear(x, f"{name}.query_key_value", hidden, 3 * hidden, bias))
        q, k, v = qkv.split((1, 1, 1))
        q, k = self.rotary(q, k)
        out = self.attend(q, k, v)
        out = g.linear(out, f"{name}.dense", hidden, hidden, bias)
        return out

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """apply_rotary_pos_emb: the rotated part and the rest, put together anew."""
        q_rot, q_pass = self.leading(q), self.passed_on(q)
        k_rot, k_pass = self.leading(k), self.passed_on(k)
        q_embed, k_embed = super().rotary(q_rot, k_rot)
        q_embed = self.g.cat((q_embed, q_pass))
        k_embed = self.g.cat((k_embed, k_pass))
        return q_embed, k_embed
