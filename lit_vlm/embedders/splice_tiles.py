"""Splice of pictures whose tiles are put together: rows of the whole picture, each closed by a learned vector."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, VisualTokens
from lit_vlm.core.tiling import Tiling
from lit_vlm.core.transfer import send
from lit_vlm.decoders.base import Decoder
from lit_vlm.embedders.base import Embedder, check_grids, scatter_visual


def put_together(grid: Grid, tiling: Tiling) -> Grid:
    """The layout of a picture whose tiles are put together: the copy, then rows without padding, each with a newline.

    Args:
        grid: of the tiles, one below the other.
        tiling: how they make up the picture.

    Raises:
        ValueError: where the tokens are not the patches of that many tiles, or are not read row by row.
    """
    side, tiles = grid.cols, 1 + tiling.rows * tiling.cols
    if grid != Grid(side * tiles, side):
        raise ValueError(
            f"embedder SpliceTiles puts {tiling.cols} × {tiling.rows} tiles and a copy together, and the projector "
            f"gives {grid.rows} × {grid.cols} tokens with {grid.prefix}, {grid.row_end} and {grid.suffix} around them: "
            "take an encoder of one size without a CLS token, and a projector that keeps patches in rows (MLP, Linear, "
            "Downsample with token_order row)"
        )
    return Grid(*tiling.patches(side), prefix=side * side, row_end=1)


class SpliceTiles(Embedder):
    """Splice, with the tiles of a picture put together, and a learned vector behind each row (LLaVA-NeXT).

    Of a picture of tiles (`data.AnyRes`) the small copy comes first, then the rows of patches of the whole picture,
    across tiles and without those that show only padding ("unpad"; Liu et al. 2024). Other pictures stay as they are,
    without the vector. A projector that folds patches does so inside each tile, before they are put together.

    Args:
        width: width of the decoder.
        vocab_size: rows of the decoder's word table.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size)
        self.newline = nn.Parameter(torch.randn(width) / width**0.5)  # as LLaVA-NeXT draws it
        self.tile_map = put_together

    def forward(
        self,
        batch: Batch,
        visual: VisualTokens | None,
        decoder: Decoder,
        cache: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Input vectors `[b, s, d]`; arguments and errors as in `Embedder.forward`."""
        embeds = self.words(batch.input_ids, decoder)
        if visual is None:
            return embeds
        check_grids(batch, visual, tile_map=self.tile_map)
        if batch.tilings:
            visual = self._put_together(batch, visual)
            return scatter_visual(embeds, batch.image_positions, visual)
        return scatter_visual(embeds, batch.image_positions, visual) + 0 * self.newline.sum().to(embeds.dtype)

    def words(self, input_ids: Tensor, decoder: Decoder) -> Tensor:
        """The decoder's word vectors: `[b, s]` → `[b, s, d]`."""
        return decoder.embed(input_ids)

    def _put_together(self, batch: Batch, visual: VisualTokens) -> VisualTokens:
        """The tokens in the order of the sequence, with newlines among them."""
        features, start, parts = visual.features, 0, []
        for grid, tiling in zip(visual.grids, batch.tilings, strict=True):
            if tiling is None:
                parts.append(torch.arange(start, start + grid.num_tokens))
            else:
                source = _sources(grid.cols, tiling.rows, tiling.cols, *tiling.patches(grid.cols))
                parts.append(torch.where(source < 0, len(features), source + start))
            start += grid.num_tokens
        rows = torch.cat([features, self.newline[None].to(features.dtype)])
        return VisualTokens(rows[send(torch.cat(parts), features.device)], batch.image_grids)


@lru_cache(maxsize=256)
def _sources(side: int, rows: int, cols: int, seen: int, across: int) -> Tensor:
    """For each token of a picture in the sequence, the one of its tiles that it is: `[t]`, −1 for a newline.

    Args:
        side: tokens along the side of a tile.
        rows: tiles below each other, without the copy.
        cols: tiles beside each other.
        seen: rows of tokens that are left without padding.
        across: columns of tokens that are left.
    """
    tiles = torch.arange(side**2, side**2 * (1 + rows * cols)).view(rows, cols, side, side)
    whole = tiles.transpose(1, 2).reshape(rows * side, cols * side)
    top, left = (rows * side - seen) // 2, (cols * side - across) // 2
    part = whole[top : top + seen, left : left + across]
    return torch.cat([torch.arange(side**2), F.pad(part, (0, 1), value=-1).flatten()])
