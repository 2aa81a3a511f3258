"""OPT: learned positions, dropout on the residual branches; OPT-350m's narrow token table."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Decoder, Tensor

POSITION_OFFSET = 2  # OPTLearnedPositionalEmbedding


class OPT(Decoder):
    """models/opt/modeling_opt.py"""

    embedding_name = "model.decoder.embed_tokens"
    layers_name = "model.decoder.layers"
    norm_name = "model.decoder.final_layer_norm"

    def embed(self) -> Tensor:
        arch, g = self.arch, self.g
        rows = (arch.max_positions or 0) + POSITION_OFFSET
        inputs_embeds = self.token_embedding()
        ids = g.position_ids(batched=True)
        positions = g.embedding(
            "model.decoder.embed_positions", rows, arch.hidden_size, indices=ids.shift()
        )
        if arch.embedding_width is not None:
            inputs_embeds = g.linear(
                inputs_embeds, "model.decoder.project_in", arch.embedding_width, arch.hidden_size
            )
        self.held = (inputs_embeds, ids, positions)
        return inputs_embeds + positions

    def positions(self) -> Tensor:
        return self.held[1]

    def final_norm(self, x: Tensor) -> Tensor:
        arch, g = self.arch, self.g
        if arch.figure("final_norm"):
            x = self.norm(x, self.norm_name)
        if arch.embedding_width is not None:
            x = g.linear(x, "model.decoder.project_out", arch.hidden_size, arch.embedding_width)
        return x

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        if self.arch.figure("plain_norms"):
            return self.g.layer_norm(x, None, None, self.arch.hidden_size)
        return self.layer_norm(x, name, width)

    def block(self, x: Tensor, layer: int) -> Tensor:
        arch, g = self.arch, self.g
        name = f"{self.layers_name}.{layer}"
        hidden, bias = arch.hidden_size, arch.mlp_bias
        residual = x
        if not arch.post_norm:
            x = self.norm(x, f"{name}.self_attn_layer_norm")
        x, _ = self.attention(x, f"{name}.self_attn")
        x = x.dropout(arch.dropouts.residual)
        x = residual + x
        if arch.post_norm:
            x = self.norm(x, f"{name}.self_attn_layer_norm")
        residual = x
        if not arch.post_norm:
            x = self.norm(x, f"{name}.final_layer_norm")
        x = g.linear(x, f"{name}.fc1", hidden, arch.intermediate_size, bias)
        x = self.activation(x)
        x = g.linear(x, f"{name}.fc2", arch.intermediate_size, hidden, bias)
        x = x.dropout(arch.dropouts.residual)
        x = residual + x
        if arch.post_norm:
            x = self.norm(x, f"{name}.final_layer_norm")
        return x

    def attention(self, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        arch, g = self.arch, self.g
        hidden, bias = arch.hidden_size, arch.attention_bias
        q = g.linear(x, f"{name}.q_proj", hidden, hidden, bias) * 1.0
        q = self.heads(q)
        k = g.linear(x, f"{name}.k_proj", hidden, hidden, bias)
        v = g.linear(x, f"{name}.v_proj", hidden, hidden, bias)
        k, v = self.heads(k), self.heads(v)
        weights = None
        if g.policy.attention == "eager":
            out, weights = self.eager_weights(q, k, v)
        else:
            out = self.attend(q, k, v)
        out = g.linear(out, f"{name}.out_proj", hidden, hidden, bias)
        return out, weights

    def eager_weights(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """eager_attention_forward: softmax in fp32, cast back."""
        arch, g = self.arch, self.g
        weights = g.scores(q, k, arch.heads) * 1.0
        if self.mask is not None:
            weights = weights + self.mask
        weights = weights.softmax("fp32").to(q.dtype)
        weights = weights.dropout(arch.dropouts.attention)
        out = g.weighted(weights, v, arch.heads)
        out = out.clone()
        return out, weights

    def head(self, x: Tensor) -> Tensor:
        arch = self.arch
        name = self.embedding_name if arch.tied_embeddings else self.head_name
        width = arch.embedding_width or arch.hidden_size
        return self.g.head(x, f"{name}.weight", width, arch.vocab_size, False)
