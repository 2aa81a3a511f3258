"""Gemma, Gemma 2 and the text model of Gemma 3."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.llama import Llama

SLIDING, FULL = "sliding", "full"


class Gemma(Llama):
    """models/gemma/modeling_gemma.py: scaled embeddings, norms that multiply by 1 + weight."""

    def token_embedding(self) -> Tensor:
        """GemmaTextScaledWordEmbedding: the module's output, which peft's hook sees, is scaled."""
        g, arch = self.g, self.arch
        x = g.embedding(self.embedding_name, arch.vocab_size, arch.hidden_size) * 1.0
        if g.policy.checkpointing and not g.policy.trains_base:
            x = g.require_grad(x)
        return x

    def rms_norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """GemmaRMSNorm: all of it in fp32, cast back at the end."""
        width = width or self.arch.hidden_size
        weight = self.g.parameter(f"{name}.weight", width)
        output = self.normalized(x.float(), width)
        output = output * weight.float().shift()
        return output.to(x.dtype)

    @staticmethod
    def normalized(x: Tensor, width: int) -> Tensor:
        return x * x.pow().mean(width).shift().rsqrt()

    def buffers(self) -> None:
        self.g.buffer(f"{self.embedding_name}.embed_scale", 1)
        super().buffers()


class Gemma2(Gemma):
    """models/gemma2/modeling_gemma2.py: norms on both sides, sliding and full layers, soft caps."""

    @property
    def kinds_differ(self) -> bool:
        """Sliding layers differ by their mask: what they save of it, or how long they hold it."""
        policy = self.g.policy
        if policy.attention == "sdpa":
            return bool(policy.beyond_window)
        return bool(policy.attention == "eager" and policy.checkpointing)

    def kind(self, layer: int) -> str:
        return self.arch.layer_kinds[layer] if self.kinds_differ else FULL

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Full mask, sliding mask, cos, sin."""
        full, sliding = self.g.causal_mask(x), self.g.sliding_mask(x)
        return (full, sliding, *self.g.rotary_tables(x, self.arch.rotary_dim))

    def tables_for(self, layer: int, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        full, sliding, cos, sin = tables
        return (sliding if self.arch.layer_kinds[layer] == SLIDING else full, cos, sin)

    def block(self, x: Tensor, layer: int) -> Tensor:
        name = f"{self.layers_name}.{layer}"
        residual = x
        x = self.norm(x, f"{name}.input_layernorm")
        x = self.attention(x, f"{name}.self_attn")
        x = self.norm(x, f"{name}.post_attention_layernorm")
        x = residual + x
        residual = x
        x = self.norm(x, f"{name}.pre_feedforward_layernorm")
        x = self.mlp(x, f"{name}.mlp")
        x = self.norm(x, f"{name}.post_feedforward_layernorm")
        x = residual + x
        return x

    def head(self, x: Tensor) -> Tensor:
        logits = super().head(x)
        if self.arch.logit_softcap:
            logits = logits / 1.0
            logits = logits.tanh()
            logits = logits * 1.0
        return logits


class Gemma3(Gemma2):
    """models/gemma3/modeling_gemma3.py, Gemma3ForCausalLM: normed query and key, two rotations."""

    def stage(self, layer: int) -> str:
        """Where kinds allocate alike, the first full layer's backward still frees tables."""
        kinds = self.arch.layer_kinds
        first = FULL in kinds and layer == kinds.index(FULL)
        return "first full" if first and not self.kinds_differ else self.kind(layer)

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """Full mask, sliding mask, then cos and sin of each kind."""
        full, sliding = self.g.causal_mask(x), self.g.sliding_mask(x)
        return ((full, *self.rotation(x, FULL)), (sliding, *self.rotation(x, SLIDING)))

    def rotation(self, x: Tensor, kind: str) -> tuple[Tensor, ...]:
        """cos and sin, made only for the kinds that there are."""
        if kind not in self.arch.layer_kinds:
            return (None, None)
        cos, sin = self.g.rotary_tables(x, self.arch.rotary_dim)
        return (cos, sin)

    def tables_for(self, layer: int, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        full, sliding = tables
        mask, cos, sin = sliding if self.arch.layer_kinds[layer] == SLIDING else full
        return (mask, cos, sin)

    def project(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, name)
        q = self.norm(q, f"{name}.q_norm", self.arch.head_dim)
        k = self.norm(k, f"{name}.k_norm", self.arch.head_dim)
        return q, k, v

    def buffers(self) -> None:
        self.g.buffer(f"{self.embedding_name}.embed_scale", 1)
        for kind in sorted(set(self.arch.layer_kinds)):
            for name in ("inv_freq", "original_inv_freq"):
                buffer = f"model.rotary_emb.{kind}_attention_{name}"
                self.g.buffer(buffer, self.arch.rotary_dim // 2)
