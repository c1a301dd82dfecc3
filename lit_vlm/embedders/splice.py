"""Splice: the decoder's own word vectors, with visual tokens on the image positions."""

from __future__ import annotations

from torch import Tensor

from lit_vlm.batch import Batch, VisualTokens
from lit_vlm.decoders.base import Decoder
from lit_vlm.embedders.base import Embedder, scatter_visual


class Splice(Embedder):
    """The decoder's word vectors, with each image's tokens on its positions (LLaVA, VILA, EVE)."""

    def forward(self, batch: Batch, visual: VisualTokens | None, decoder: Decoder) -> Tensor:
        """Input vectors `[b, s, d]`."""
        embeds = decoder.embed(batch.input_ids)
        return embeds if visual is None else scatter_visual(embeds, batch, visual)
