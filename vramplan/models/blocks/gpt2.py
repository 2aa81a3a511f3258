"""GPT-2: learned positions, Conv1D projections, dropout in every place."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Decoder, Tensor


class GPT2(Decoder):
    """models/gpt2/modeling_gpt2.py"""

    embedding_name = "transformer.wte"
    layers_name = "transformer.h"
    norm_name = "transformer.ln_f"

    def embed(self) -> Tensor:
        arch, g = self.arch, self.g
        inputs_embeds = self.token_embedding()
        ids = g.position_ids()
        positions = g.embedding(
            "transformer.wpe", arch.max_positions, arch.hidden_size, indices=ids
        )
        x = inputs_embeds + positions
        self.held = (inputs_embeds, ids, positions)
        return x.dropout(arch.dropouts.embedding)

    def positions(self) -> Tensor:
        return self.held[1]

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.ln_1")
        attn_output, _ = self.attention(x, f"{name}.attn")
        x = attn_output + residual
        residual = x
        x = self.norm(x, f"{name}.ln_2")
        feed_forward = self.mlp(x, f"{name}.mlp")
        x = residual + feed_forward
        return x

    def conv1d(self, x: Tensor, name: str, n_in: int, n_out: int) -> Tensor:
        return self.g.linear(x, name, n_in, n_out, True, transposed=True)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        arch = self.arch
        x = self.conv1d(x, f"{name}.c_fc", arch.hidden_size, arch.intermediate_size)
        x = self.activation(x)
        x = self.conv1d(x, f"{name}.c_proj", arch.intermediate_size, arch.hidden_size)
        return x.dropout(arch.dropouts.residual)

    def attention(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        arch = self.arch
        hidden = arch.hidden_size
        qkv = self.conv1d(x, f"{name}.c_attn", hidden, 3 * hidden)
        q, k, v = qkv.split((hidden, hidden, hidden))
        del qkv
        k = self.heads(k)
        v = self.heads(v)
        q = self.heads(q)
        out, weights = self.attend_weights(q, k, v)
        out = self.conv1d(out, f"{name}.c_proj", hidden, hidden)
        out = out.dropout(arch.dropouts.residual)
        return out, weights

    def attend_weights(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The attention interface: heads merged, and the eager one's probabilities."""
        if self.g.policy.attention != "eager":
            return self.attend(q, k, v), None
        out, weights = self.eager_weights(q, k, v)
        return out.clone(), weights

    def eager_weights(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """eager_attention_forward: softmax in the scores' dtype but for autocast."""
        arch, g = self.arch, self.g
        if arch.figure("upcast_attention"):
            weights = self.upcast_scores(q, k)
        else:
            weights = g.scores(q, k, arch.heads) * 1.0
        if self.mask is not None:
            weights = weights + self.mask
        weights = weights.softmax()
        weights = weights.to(v.dtype)
        weights = weights.dropout(arch.dropouts.attention)
        out = g.weighted(weights, v, arch.heads)
        return out, weights

    def upcast_scores(self, q: Tensor, k: Tensor) -> Tensor:
        """_upcast_and_reordered_attn: fp32 scores outside autocast, into a tensor made before."""
        arch, g = self.arch, self.g
        before = g.empty_scores(arch.heads, "fp32")
        q, k = g.dense_heads(q), g.dense_heads(k)
        return g.baddbmm(before, q.float(), k.float(), arch.heads)
