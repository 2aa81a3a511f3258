"""GPT-J: rotation of neighbouring dimensions, attention in fp32, feed-forward beside attention."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.phi import PartialRotary


class GPTJ(PartialRotary):
    """models/gptj/modeling_gptj.py; it has no sdpa, so all but flash_attention_2 is eager."""

    embedding_name = "transformer.wte"
    layers_name = "transformer.h"
    norm_name = "transformer.ln_f"

    @property
    def flash(self) -> bool:
        return bool(self.g.policy.attention == "flash_attention_2")

    def embed(self) -> Tensor:
        x = self.token_embedding()
        self.held = (x, None)
        return x.dropout(self.arch.dropouts.embedding)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        return (None if self.flash else self.g.eager_mask(x),)

    def buffers(self) -> None:
        """Every layer has its own table of positions."""
        arch = self.arch
        for layer in range(arch.layers):
            name = f"{self.layers_name}.{layer}.attn.embed_positions"
            self.g.buffer(name, arch.figure("positions") * arch.rotary_dim)

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def run(self, x: Tensor, layer: int, tables: tuple[Tensor, ...]) -> Tensor:
        """The model's loop holds a block's `outputs`, probabilities too, until the next returns."""
        self.tables = tables
        try:
            x, weights = self.block_outputs(x, layer)
        finally:
            self.tables = ()
        if not self.g.recomputing:
            self.held = (self.held[0], weights)
        return x

    def block_outputs(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.ln_1")
        attn_outputs, weights = self.attention(x, f"{name}.attn")
        feed_forward = self.mlp(x, f"{name}.mlp")
        x = attn_outputs + feed_forward + residual
        return x, weights

    def mlp(self, x: Tensor, name: str) -> Tensor:
        arch, g = self.arch, self.g
        x = g.linear(x, f"{name}.fc_in", arch.hidden_size, arch.intermediate_size, True)
        x = self.activation(x)
        x = g.linear(x, f"{name}.fc_out", arch.intermediate_size, arch.hidden_size, True)
        return x.dropout(arch.dropouts.residual)

    def attention(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        arch, g = self.arch, self.g
        hidden = arch.hidden_size
        q = g.linear(x, f"{name}.q_proj", hidden, hidden)
        k = g.linear(x, f"{name}.k_proj", hidden, hidden)
        v = self.heads(g.linear(x, f"{name}.v_proj", hidden, hidden))
        embed_positions = g.table(arch.figure("positions") * arch.rotary_dim, "fp32")
        indices = g.table(arch.rotary_dim, "int64", positions=True)
        sincos = g.table(arch.rotary_dim, "fp32", positions=True).to(k.dtype)
        k_rot, k_pass = self.leading(k), self.passed_on(k)
        q_rot, q_pass = self.leading(q), self.passed_on(q)
        k_rot = self.rotated(k_rot)
        q_rot = self.rotated(q_rot)
        k = g.cat((k_rot, k_pass))
        q = g.cat((q_rot, q_pass))
        k = self.permuted(k)
        q = self.permuted(q)
        if self.flash:
            out = g.fused_attention(q, k, v, None, arch.heads, arch.heads, arch.head_dim)
            weights = None
        else:
            out, weights = self.probabilities(q, k, v)
            out = out.clone()
        out = g.linear(out, f"{name}.out_proj", hidden, hidden)
        out = out.dropout(arch.dropouts.residual)
        del embed_positions, indices, sincos  # here: they live as long as the function's variables
        return out, weights

    @staticmethod
    def permuted(x: Tensor) -> Tensor:
        """permute(0, 2, 1, 3) of what lies tokens before heads."""
        x = x.alias()
        x.strided = True
        return x

    def rotated(self, x: Tensor) -> Tensor:
        """apply_rotary_pos_emb: each call repeats sine and cosine for itself."""
        sin = self.g.table(self.arch.rotary_dim, x.dtype, positions=True)
        cos = self.g.table(self.arch.rotary_dim, x.dtype, positions=True)
        return (x * cos) + (self.rotate_half(x) * sin)

    def probabilities(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """_attn: queries and keys in fp32, which autocast's matmul casts back."""
        arch, g = self.arch, self.g
        q = q.float()
        k = k.float()
        weights = g.scores(q, k, arch.heads)
        weights = weights / 1.0
        weights = weights + self.mask
        weights = weights.softmax()
        weights = weights.to(v.dtype)
        weights = weights.dropout(arch.dropouts.attention)
        out = g.weighted(weights, v, arch.heads)
        return out, weights
