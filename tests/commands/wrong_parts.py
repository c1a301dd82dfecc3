"""Parts that break their contract, each in one way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, Images, VisualTokens
from lit_vlm.decoders import Decoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import LinearPatches
from lit_vlm.heads import Head, Tap
from lit_vlm.projectors import Linear


class WideProjector(Linear):
    """Gives the encoder's width in place of the decoder's."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        return tokens


class CrossedProjector(Linear):
    """Reads another width than the encoder's."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.linear = nn.Linear(in_width + 1, out_width)


class HalvingProjector(Linear):
    """Drops every other token and says nothing of it."""

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        grids = tuple(Grid(1, grid.num_tokens // 2) for grid in tokens.grids)
        half = VisualTokens(tokens.features[: sum(grid.num_tokens for grid in grids)], grids)
        return super().forward(half)


class ShyEncoder(LinearPatches):
    """Says another width than it gives."""

    def __init__(self) -> None:
        super().__init__(16, 14)
        self.width = 24


class MisplacedEncoder(LinearPatches):
    """Its patch_grid says one row less."""

    def __init__(self) -> None:
        super().__init__(16, 14)

    def forward(self, images: Images) -> VisualTokens:
        tokens = super().forward(images)
        grids = tuple(Grid(1, grid.num_tokens) for grid in tokens.grids)
        return VisualTokens(tokens.features, grids)


class ShortEmbedder(Splice):
    """Loses the last position."""

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: object = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return super().forward(batch, visual, decoder, cache, attention_mask)[:, :-1]


class ListingHead(Head):
    """Gives a number per sample."""

    normaliser = "samples"
    taps = (1,)

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        return states[1].float().mean((1, 2))


class CrossedHead(Head):
    """Multiplies with a matrix of another width."""

    normaliser = "samples"
    taps = (1,)

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        return (states[1].float() @ torch.ones(self.width + 1, 1)).sum()
