"""BLOOM: alibi, fused projections, a norm after the embedding; eager attention alone."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.held_outputs import HeldOutputs


class Bloom(HeldOutputs):
    """models/bloom/modeling_bloom.py"""

    def embed(self) -> Tensor:
        inputs_embeds = self.token_embedding()
        self.held = (inputs_embeds,)
        return self.norm(inputs_embeds, "transformer.word_embeddings_layernorm")

    def positions(self) -> Tensor:
        return None  # alibi knows them

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        alibi = self.g.alibi(self.arch.heads, x.dtype)
        return (self.g.eager_mask(self.held[0]), alibi)

    def block_outputs(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        name = f"{self.layers_name}.{layer}"
        after_norm = self.arch.figure("residual_after_norm")
        layernorm_output = self.norm(x, f"{name}.input_layernorm")
        residual = layernorm_output if after_norm else x
        attention_output, weights = self.attention(
            layernorm_output, residual, f"{name}.self_attention"
        )
        layernorm_output = self.norm(attention_output, f"{name}.post_attention_layernorm")
        residual = layernorm_output if after_norm else attention_output
        output = self.mlp(layernorm_output, residual, f"{name}.mlp")
        return output, weights

    def dropout_add(self, x: Tensor, residual: Tensor) -> Tensor:
        out = x.dropout(self.arch.dropouts.residual)
        out = residual + out
        return out

    def mlp(self, x: Tensor, residual: Tensor, name: str) -> Tensor:
        g, hidden, width = self.g, self.arch.hidden_size, self.arch.intermediate_size
        x = g.linear(x, f"{name}.dense_h_to_4h", hidden, width, True).bloom_gelu()
        intermediate_output = g.linear(x, f"{name}.dense_4h_to_h", width, hidden, True)
        return self.dropout_add(intermediate_output, residual)

    def attention(self, x: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        arch, g = self.arch, self.g
        mask, alibi = self.tables
        hidden = arch.hidden_size
        qkv = g.linear(x, f"{name}.query_key_value", hidden, 3 * hidden, True)
        q, k, v = g.select_heads(qkv), g.select_heads(qkv), g.select_heads(qkv)
        q = g.dense_heads(q)
        k = g.dense_heads(k)
        v = g.dense_heads(v)
        scores = g.baddbmm(alibi.lower(), q.lower(), k.lower(), arch.heads)
        weights = scores + mask
        probabilities = weights.softmax("fp32").to(q.dtype)
        probabilities = probabilities.dropout(arch.dropouts.attention)
        context = g.weighted(probabilities, v, arch.heads)
        context = context.clone()
        out = g.linear(context, f"{name}.dense", hidden, hidden, True)
        out = self.dropout_add(out, residual)
        return out, probabilities
