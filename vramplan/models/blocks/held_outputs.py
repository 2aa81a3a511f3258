"""What BLOOM and Falcon share: names, norms, and a loop that holds on to a block's outputs."""

from __future__ import annotations

from vramplan.models.blocks.decoder import Decoder, Tensor


class HeldOutputs(Decoder):
    """A decoder whose blocks return attention probabilities beside the hidden states."""

    embedding_name = "transformer.word_embeddings"
    layers_name = "transformer.h"
    norm_name = "transformer.ln_f"

    def norm(self, x: Tensor, name: str, width: int | None = None) -> Tensor:
        return self.layer_norm(x, name, width)

    def run(self, x: Tensor, layer: int, tables: tuple[Tensor, ...]) -> Tensor:
        """The model's loop keeps a block's outputs, its probabilities too, until the next's."""
        self.tables = tables
        try:
            outputs = self.block_outputs(x, layer)
        finally:
            self.tables = ()
        if not self.g.recomputing:
            self.held = (self.held[0], *outputs)
        return outputs[0]

    def block_outputs(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Hidden states and probabilities."""
        raise NotImplementedError
