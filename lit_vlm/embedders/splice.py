"""Splice: the decoder's own word vectors, with visual tokens on the image positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_vlm.batch import Batch, VisualTokens
from lit_vlm.decoders.base import Decoder
from lit_vlm.embedders.base import Embedder, check_grids, scatter_visual


class Splice(Embedder):
    """The decoder's word vectors, with each image's tokens on its positions (LLaVA, VILA, EVE)."""

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Input vectors `[b, s, d]`; see `Embedder.forward`."""
        embeds = self.words(batch.input_ids, decoder)
        if visual is None:
            return embeds
        check_grids(batch, visual)
        return scatter_visual(embeds, batch.image_positions, visual)

    def words(self, input_ids: Tensor, decoder: Decoder) -> Tensor:
        """The decoder's word vectors: `[b, s]` → `[b, s, d]`."""
        return decoder.embed(input_ids)
