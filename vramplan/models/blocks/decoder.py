"""What decoder families share: embedding, norms, rotary positions, attention, feed-forward, head.

A description runs on a builder `g` (memory/graph.py when memory is wanted, models/tensors.py when
only the parameters are). Its local variables live as long as those of the code that it mirrors
(transformers 5.17, models/*/modeling_*.py), so it names and rebinds them alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from vramplan.models.architecture import Architecture

Tensor = Any  # a builder's value


class Decoder:
    """A causal decoder. Families override what differs."""

    embedding_name: ClassVar[str] = "model.embed_tokens"
    layers_name: ClassVar[str] = "model.layers"
    norm_name: ClassVar[str] = "model.norm"
    head_name: ClassVar[str] = "lm_head"
    declared_first: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Modules that stand in model.parameters() before one whose forward comes first."""

    def __init__(self, arch: Architecture, g: Any) -> None:
        self.arch = arch
        self.g = g
        self.tables: tuple[Tensor, ...] = ()
        self.weights: Tensor = None  # eager attention's second result: layers hold it to their end
        self.held: tuple[Tensor, ...] = ()  # variables of the model's forward

    # -- the model's forward ------------------------------------------------------------------
    def kind(self, layer: int) -> str:
        """Layers of one kind allocate alike."""
        return "layer"

    def stage(self, layer: int) -> str:
        """Layers of one stage also free alike: of its kind, unless something ends with it."""
        return self.kind(layer)

    def embed(self) -> Tensor:
        """What the first block is given; `held` keeps what the model's forward keeps of it."""
        x = self.token_embedding()
        self.held = (x,)
        return x

    def token_embedding(self) -> Tensor:
        """Token embedding; peft's enable_input_require_grads hooks its output."""
        g, arch = self.g, self.arch
        x = g.embedding(
            self.embedding_name, arch.vocab_size, arch.embedding_width or arch.hidden_size
        )
        if g.policy.checkpointing and not g.policy.trains_base:
            x = g.require_grad(x)
        return x

    def positions(self) -> Tensor:
        """Position ids as every layer is given them; the layers' checkpoints keep them."""
        return self.g.position_ids()

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """What every block is given: mask, cos, sin."""
        mask = self.g.causal_mask(x)
        if not self.arch.rotary_dim:
            return (mask, None, None)
        return (mask, *self.g.rotary_tables(x, self.arch.rotary_dim))

    def tables_for(self, layer: int, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mask, cos and sin of one layer, where kinds of layers have their own."""
        return tables

    @property
    def mask(self) -> Tensor:
        return self.tables[0]

    def run(self, x: Tensor, layer: int, tables: tuple[Tensor, ...]) -> Tensor:
        """One block; the tables are its arguments, so it holds them no longer than it runs."""
        self.g.works("layer")
        self.tables = tables
        try:
            return self.block(x, layer)
        finally:
            self.tables, self.weights = (), None

    def block(self, x: Tensor, layer: int) -> Tensor:
        raise NotImplementedError

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x, self.norm_name)

    def head(self, x: Tensor) -> Tensor:
        """Logits."""
        arch = self.arch
        return self.g.head(
            x,
            f"{self.embedding_name if arch.tied_embeddings else self.head_name}.weight",
            arch.hidden_size,
            arch.vocab_size,
            arch.head_bias and f"{self.head_name}.bias",
        )

    def buffers(self) -> None:
        """Non-persistent buffers: the rotary frequencies, and a copy for dynamic scaling."""
        if self.arch.rotary_dim:
            for name in ("inv_freq", "original_inv_freq"):
                self.g.buffer(f"model.rotary_emb.{name}", self.arch.rotary_dim // 2)

    # -- norms --------------------------------------------------------------------------------
    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.rms_norm(x, name, width)

    def rms_norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """LlamaRMSNorm: computed in fp32, the weight applied after casting back."""
        width = width or self.arch.hidden_size
        weight = self.g.parameter(f"{name}.weight", width)
        before = x.dtype
        x = x.float()
        variance = x.pow().mean(width)
        x = x * (variance * 1.0).rsqrt()
        return weight * x.to(before)

    def layer_norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """nn.LayerNorm."""
        width = width or self.arch.hidden_size
        weight = self.g.parameter(f"{name}.weight", width)
        bias = self.g.parameter(f"{name}.bias", width) if self.arch.norm_bias else None
        return self.g.layer_norm(x, weight, bias, width)

    # -- positions ----------------------------------------------------------------------------
    @staticmethod
    def rotate_half(x: Tensor) -> Tensor:
        first = x.slice(1, 2)
        second = x.slice(1, 2)
        return first.tape.cat((-second, first))

    def rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """apply_rotary_pos_emb: q * cos + rotate_half(q) * sin."""
        _, cos, sin = self.tables
        q_embed = (q * cos) + (self.rotate_half(q) * sin)
        k_embed = (k * cos) + (self.rotate_half(k) * sin)
        return q_embed, k_embed

    # -- attention ----------------------------------------------------------------------------
    def heads(self, x: Tensor) -> Tensor:
        """view(batch, sequence, heads, head_dim).transpose(1, 2)"""
        return x.split_heads()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention interface: eager, or a fused kernel; then heads merged back."""
        arch = self.arch
        if self.g.policy.attention == "eager":
            return self.eager(q, k, v)
        return self.g.fused_attention(
            q,
            k,
            v,
            self.mask,
            arch.heads,
            arch.kv_heads,
            arch.head_dim,
            dropout=arch.dropouts.attention,
        )

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """eager_attention_forward of the llama kin: softmax in fp32, cast back, dropout."""
        arch, g = self.arch, self.g
        groups = arch.heads // arch.kv_heads
        k_states = k.expand(groups, view=arch.kv_heads == 1)
        v_states = v.expand(groups, view=arch.kv_heads == 1)
        weights = g.scores(q, k_states, arch.heads) * 1.0
        if arch.attention_softcap:
            weights = weights / 1.0
            weights = weights.tanh()
            weights = weights * 1.0
        if self.mask is not None:
            weights = weights + self.mask
        weights = weights.softmax("fp32").to(q.dtype)
        weights = weights.dropout(arch.dropouts.attention)
        out = g.weighted(weights, v_states, arch.heads)
        self.weights = weights
        return out.clone()

    # -- feed-forward -------------------------------------------------------------------------
    def activation(self, x: Tensor) -> Tensor:
        return self.g.activation(x, self.arch.activation)

    def gated_mlp(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        """down(act(gate(x)) * up(x))"""
        arch, g = self.arch, self.g
        hidden, width = arch.hidden_size, width or arch.intermediate_size
        bias = arch.mlp_bias
        return g.linear(
            g.tailed(
                self.activation(g.linear(x, f"{name}.gate_proj", hidden, width, bias))
                * g.linear(x, f"{name}.up_proj", hidden, width, bias),
                arch.deviation,
            ),
            f"{name}.down_proj",
            width,
            hidden,
            bias,
        )
