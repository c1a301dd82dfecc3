"""The embedder slot."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_vlm.batch import Batch, VisualTokens
from lit_vlm.decoders.base import Decoder
from lit_vlm.part import Part


class Embedder(Part, ABC):
    """Text ids and visual tokens → the decoder's input vectors.

    Args:
        width: width of the decoder.
        vocab_size: rows of the decoder's word table.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.width, self.vocab_size = width, vocab_size

    @abstractmethod
    def forward(self, batch: Batch, visual: VisualTokens | None, decoder: Decoder) -> Tensor:
        """Input vectors `[b, s, d]`.

        Args:
            batch: ids and the positions of the images.
            visual: features `[t, d]` in the order of the batch's images; None while decoding continues.
            decoder: whose word table may be read.
        """


def scatter_visual(embeds: Tensor, batch: Batch, visual: VisualTokens) -> Tensor:
    """Put the visual tokens on their positions: `[b, s, d]`.

    In a batch without images `visual` is the dummy's. Its tokens are added with weight zero, so that encoder and
    projector take part in forward and backward on every rank.

    Raises:
        ValueError: when encoder and collator disagree about the number of tokens.
    """
    if not batch.image_grids:
        return embeds + 0 * visual.features.sum().to(embeds.dtype)
    if visual.grids != batch.image_grids:
        raise ValueError(
            f"encoder and projector gave {visual.features.shape[0]} visual tokens {visual.grids[:3]}, the batch has "
            f"{len(batch.image_positions)} image positions {batch.image_grids[:3]}: a part's grid is not what it does"
        )
    flat = embeds.flatten(0, 1).index_copy(0, batch.image_positions, visual.features.to(embeds.dtype))
    return flat.view_as(embeds)
