"""A causal language model as figures, free of Hugging Face key names."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of experts: sizes of the routed and the shared ones."""

    count: int
    """Routed experts in a layer."""
    active: int
    """Experts that a token visits (top-k)."""
    width: int
    """Intermediate size of one routed expert."""
    shared_width: int = 0
    """Intermediate size of all shared experts together; 0 where there are none."""
    groups: int = 1
    """Router groups (DeepSeek's group-limited routing)."""
    first_dense: int = 0
    """Leading layers with a dense feed-forward instead."""
    dense_layers: tuple[int, ...] = ()
    """Further layers that are dense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek V2, V3): ranks and head sizes."""

    query_rank: int | None
    """Rank of the query's compression; None: a plain projection."""
    key_value_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropouts:
    """Probabilities in training; 0 means that the module is an identity."""

    embedding: float = 0.0
    attention: float = 0.0
    residual: float = 0.0
    feed_forward: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The figures that memory and time follow from. Sizes are numbers of elements."""

    family: str
    """transformers' `model_type`; selects the block description."""
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int | None = None
    """Longest sequence that the configuration names; None: no limit."""
    learned_positions: bool = False
    """A table of positions: longer sequences are an error, not a warning."""
    tied_embeddings: bool = False
    activation: str = "silu"
    gated: bool = True
    """The feed-forward has a gate beside its up projection."""
    rotary_dim: int = 0
    """Leading dimensions of a head that are rotated; 0: no rotary positions."""
    attention_bias: bool = False
    """Bias of the query, key and value projections."""
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    norm_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    """Attention and feed-forward of a parallel block read the same norm's output."""
    post_norm: bool = False
    """Norm after the sublayer instead of before it."""
    embedding_width: int | None = None
    """Width of the token table where it differs from `hidden_size` (OPT-350m's projections)."""
    sliding_window: int | None = None
    layer_kinds: tuple[str, ...] = ()
    """Kind of every layer where they differ ("full", "sliding"); empty: all alike."""
    attention_softcap: bool = False
    logit_softcap: bool = False
    logit_scale: bool = False
    """Logits are multiplied by a constant (Cohere, Granite)."""
    embedding_scale: bool = False
    residual_scale: bool = False
    dropouts: Dropouts = field(default_factory=Dropouts)
    experts: Experts | None = None
    latent: LatentAttention | None = None
    initializer_range: float = 0.02
    """Standard deviation of freshly initialised weights; int8's outliers are reckoned from it."""
    extra: tuple[tuple[str, int], ...] = ()
    """Further figures of one family, by name."""

    @property
    def deviation(self) -> float:
        """Of the outputs of a freshly initialised linear on normalized inputs."""
        return self.initializer_range * sqrt(self.hidden_size)

    def figure(self, name: str, default: int = 0) -> int:
        """A figure of `extra`."""
        return dict(self.extra).get(name, default)
