"""Families near llama with layer norms: StableLM, StarCoder2, Cohere."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.llama import Llama
from vramplan.models.blocks.windowed import Windowed


class StableLm(Llama):
    """models/stablelm/modeling_stablelm.py"""

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def block(self, x: Tensor, layer: int) -> Tensor:
        arch, name = self.arch, f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        attended = self.attention(x, f"{name}.self_attn")
        if arch.parallel_residual:
            fed = self.mlp(x, f"{name}.mlp")
            fed = fed.dropout(arch.dropouts.residual)
            x = residual + attended + fed
        else:
            residual = residual + attended
            fed = self.mlp(self.norm(residual, f"{name}.post_attention_layernorm"), f"{name}.mlp")
            fed = fed.dropout(arch.dropouts.residual)
            x = residual + fed
        return x

    def attention(self, x: Tensor, name: str) -> Tensor:
        """The rotated and the passing part of a head stay variables to the end."""
        arch, rotary, whole = self.arch, self.arch.rotary_dim, self.arch.head_dim
        q, k, v = self.project(x, name)
        if arch.qk_norm:
            q = self.norm_heads(q, f"{name}.q_layernorm", arch.heads)
            k = self.norm_heads(k, f"{name}.k_layernorm", arch.kv_heads)
        q_rot, q_pass = q.slice(rotary, whole), q.slice(whole - rotary, whole)
        k_rot, k_pass = k.slice(rotary, whole), k.slice(whole - rotary, whole)
        q_rot, k_rot = self.rotary(q_rot, k_rot)
        q = self.g.cat((q_rot, q_pass))
        k = self.g.cat((k_rot, k_pass))
        out = self.attend(q, k, v)
        out = self.g.linear(out, f"{name}.o_proj", arch.hidden_size, arch.hidden_size)
        return out

    def norm_heads(self, x: Tensor, name: str, heads: int) -> Tensor:
        """StableLmLayerNormPerHead: one norm without bias for every head."""
        g, width = self.g, self.arch.head_dim
        parts = x.split([1] * heads)
        return g.cat(
            [
                g.layer_norm(part, g.parameter(f"{name}.norms.{i}.weight", width), None, width)
                for i, part in enumerate(parts)
            ]
        )


class Starcoder2(Windowed):
    """models/starcoder2/modeling_starcoder2.py: biases, dropouts, a plain feed-forward."""

    def embed(self) -> Tensor:
        x = self.token_embedding()
        self.held = (x,)
        return x.dropout(self.arch.dropouts.embedding)

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def attention(self, x: Tensor, name: str) -> Tensor:
        out = super().attention(x, name)
        return out.dropout(self.arch.dropouts.residual)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        arch, g = self.arch, self.g
        hidden, width, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
        x = g.linear(x, f"{name}.c_fc", hidden, width, bias)
        x = self.activation(x)
        x = g.linear(x, f"{name}.c_proj", width, hidden, bias)
        x = x.dropout(arch.dropouts.residual)
        return x


class Cohere(Llama):
    """models/cohere/modeling_cohere.py: a parallel block, norms and positions in fp32."""

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        width = width or self.arch.hidden_size
        return self.mean_norm(x, self.g.parameter(f"{name}.weight", width), width)

    @staticmethod
    def mean_norm(x: Tensor, weight: Tensor, width: int) -> Tensor:
        """CohereLayerNorm: written out in Python, without bias."""
        before = x.dtype
        x = x.float()
        mean = x.mean(width)
        variance = x.minus(mean).pow().mean(width)
        x = x.minus(mean) * (variance * 1.0).rsqrt()
        x = weight.float() * x
        return x.to(before)

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        attended = self.attention(x, f"{name}.self_attn")
        fed = self.mlp(x, f"{name}.mlp")
        x = residual + attended + fed
        return x

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """With `use_qk_norm` queries and keys are normed, with a weight for every head."""
        arch, g, width = self.arch, self.g, self.arch.head_dim
        q = self.project_one(x, f"{name}.q_proj", arch.heads)
        k = self.project_one(x, f"{name}.k_proj", arch.kv_heads)
        v = self.project_one(x, f"{name}.v_proj", arch.kv_heads)
        if arch.qk_norm:
            q = self.mean_norm(q, g.parameter(f"{name}.q_norm.weight", arch.heads, width), width)
            k = self.mean_norm(k, g.parameter(f"{name}.k_norm.weight", arch.kv_heads, width), width)
        return self.heads(q), self.heads(k), self.heads(v)

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        before = q.dtype
        q = q.float()
        k = k.float()
        q_embed, k_embed = super().rotary(q, k)
        return q_embed.to(before), k_embed.to(before)

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        return logits * 1.0
