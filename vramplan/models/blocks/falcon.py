"""Falcon: fused heads of three layouts, parallel blocks, alibi in the old variants.

Its linears are a subclass of nn.Linear, x @ weight.T + bias: transformers never quantizes them
(integrations/bitsandbytes.py asks for the very type), peft adapts them.
"""

from __future__ import annotations

from typing import Any

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.held_outputs import HeldOutputs


class Falcon(HeldOutputs):
    """models/falcon/modeling_falcon.py"""

    def buffers(self) -> None:
        for name in ("inv_freq", "original_inv_freq"):
            self.g.buffer(f"transformer.rotary_emb.{name}", self.arch.head_dim // 2)

    def linear(self, x: Tensor, name: str, n_in: int, n_out: int) -> Tensor:
        return self.g.linear(
            x, name, n_in, n_out, self.arch.mlp_bias, quantizable=False, product=True
        )

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """The mask is always made; alibi goes into it, and alone into eager's scores as well."""
        arch, g = self.arch, self.g
        alibi = g.alibi(arch.heads, x.dtype) if arch.figure("alibi") else None
        mask = g.eager_mask(x) if g.policy.attention == "eager" else g.boolean_mask()
        if alibi is None:
            return (mask, *g.rotary_tables(x, arch.head_dim))
        mask = g.alibi_mask(alibi, mask, arch.heads)
        return (mask, *g.rotary_tables(x, arch.head_dim), alibi)

    def block_outputs(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        arch = self.arch
        name = f"{self.layers_name}.{layer}"
        residual = x
        normed_mlp = None
        if arch.parallel_residual and not arch.shared_norm:
            normed = self.norm(x, f"{name}.ln_attn")
            normed_mlp = self.norm(x, f"{name}.ln_mlp")
        else:
            normed = self.norm(x, f"{name}.input_layernorm")
        attention_output, weights = self.attention(normed, f"{name}.self_attention")
        if not arch.parallel_residual:
            residual = self.dropout_add(attention_output, residual, arch.dropouts.attention)
            normed_mlp = self.norm(residual, f"{name}.post_attention_layernorm")
        elif arch.shared_norm:
            normed_mlp = normed
        mlp_output = self.mlp(normed_mlp, f"{name}.mlp")
        if arch.parallel_residual:
            mlp_output = mlp_output.add_into(attention_output)
        output = self.dropout_add(mlp_output, residual, arch.dropouts.residual)
        return output, weights

    def dropout_add(self, x: Tensor, residual: Tensor, p: float) -> Tensor:
        out = x.dropout(p)
        out = residual + out
        return out

    def mlp(self, x: Tensor, name: str) -> Tensor:
        arch = self.arch
        hidden, width = arch.hidden_size, arch.intermediate_size
        x = self.activation(self.linear(x, f"{name}.dense_h_to_4h", hidden, width))
        x = self.linear(x, f"{name}.dense_4h_to_h", width, hidden)
        return x

    def attention(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        arch = self.arch
        hidden = arch.hidden_size
        width = (arch.heads + 2 * arch.kv_heads) * arch.head_dim
        fused_qkv = self.linear(x, f"{name}.query_key_value", hidden, width)
        q, k, v = self.split_fused(fused_qkv)
        if not arch.figure("alibi"):
            q, k = self.rotary(q, k)
        if self.g.policy.attention == "eager":
            out, weights, _ = self.eager_weights(q, k, v, x.dtype)
        else:
            out, weights = self.fused(q, k, v), None
        out = self.linear(out, f"{name}.dense", hidden, hidden)
        return out, weights

    def split_fused(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """_split_heads: per group (40b), queries then a key and a value (7b), or head by head."""
        arch, g = self.arch, self.g
        parts = arch.heads + 2 * arch.kv_heads
        if arch.figure("grouped"):
            query = qkv.slice(arch.heads, parts)
            key = qkv.index(arch.kv_heads, parts)
            value = qkv.index(arch.kv_heads, parts)
            groups = arch.heads // arch.kv_heads
            flat = query.clone() if arch.kv_heads > 1 else query
            return flat.behind(), key.flat_expand(groups), value.flat_expand(groups)
        if arch.kv_heads == 1:
            query = qkv.slice(arch.heads, parts)
            return query.behind(), qkv.index(1, parts).behind(), qkv.index(1, parts).behind()
        return g.select_heads(qkv), g.select_heads(qkv), g.select_heads(qkv)

    @property
    def key_heads(self) -> int:
        """Heads of the keys as attention sees them: 40b repeats its own."""
        return 1 if self.arch.kv_heads == 1 and not self.arch.figure("grouped") else self.arch.heads

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """sdpa, given a mask: one key for all heads leaves only the math path."""
        arch, g = self.arch, self.g
        if g.policy.attention == "flash_attention_2":
            return g.flash(q, k, v, arch.heads, self.key_heads, arch.head_dim)
        if self.key_heads != arch.heads:
            return g.broadcast_math(q, k, v, self.mask, arch.heads, arch.head_dim).clone()
        return g.efficient(q, k, v, g.additive(self.mask, q), arch.heads, arch.head_dim)

    def eager_weights(
        self, q: Tensor, k: Tensor, v: Tensor, dtype: str
    ) -> tuple[Tensor, Tensor, Any]:
        """Softmax in the block input's dtype; scaled in place. The third: forward's variables."""
        arch, g = self.arch, self.g
        upcast = scaled = None
        times = arch.heads // self.key_heads
        scores = g.scores(q, g.broadcast(k, times), arch.heads)
        if arch.figure("alibi"):
            upcast = scores.float()
            scaled = (upcast + self.tables[3]).scale_into()
            weights = (scaled + self.mask).softmax_in(dtype)
            weights = weights.dropout(arch.dropouts.attention)
        else:
            scores = scores.scale_into()
            weights = (scores + self.mask).softmax_in(dtype)
        out = g.weighted(weights, g.broadcast(v, times), arch.heads)
        out = out.clone()
        return out, weights, (scores, upcast, scaled)
