"""Attention over a sliding window, in all layers or in some (transformers' `layer_types`)."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Tensor
from vramplan.models.blocks.llama import Llama


class Windowed(Llama):
    """Masks of full and of sliding layers; a model makes only those that its layers use.

    Beyond its window a sliding layer allocates more under sdpa than a full one: it has a mask
    (create_sliding_window_causal_mask of masking_utils.py), so no flash kernel.
    """

    def slides(self, layer: int) -> bool:
        kinds = self.arch.layer_kinds
        return "sliding" in kinds[layer] if kinds else self.arch.sliding_window is not None

    def kind(self, layer: int) -> str:
        """Sliding layers differ by their mask: what they save of it, or how long they hold it."""
        policy = self.g.policy
        if policy.attention == "sdpa":
            differ = policy.beyond_window
        else:
            differ = policy.attention == "eager" and policy.checkpointing
        return "sliding" if differ and self.slides(layer) else "full"

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        kinds = {self.slides(layer) for layer in range(self.arch.layers)}
        full = self.g.causal_mask(x) if False in kinds else None
        sliding = self.g.sliding_mask(x) if True in kinds else None
        return (full, sliding, *self.g.rotary_tables(x, self.arch.rotary_dim))

    def tables_for(self, layer: int, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        full, sliding, cos, sin = tables
        return (sliding if self.slides(layer) else full, cos, sin)
