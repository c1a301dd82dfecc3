"""Tiles: a picture cut into squares of one size, InternVL's dynamic resolution, used by HoVLE and Mono-InternVL."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data.sample.transforms import ImageTransform, Size, bicubic, side_of


@lru_cache(maxsize=32)
def _layouts(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """Layouts (columns, rows) with `least` to `most` tiles, those of the fewest tiles first."""
    found = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1) if c * r >= least]
    return tuple(sorted(found, key=lambda layout: (layout[0] * layout[1], layout)))


def in_column(whole: Tensor, side: int) -> Tensor:
    """Cut a picture `[3, rows · side, columns · side]` into squares, row by row, one below the other."""
    return whole.unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(0, 1, 3, 2, 4).reshape(3, -1, side)


class Tiles(ImageTransform):
    """The picture on the grid of square tiles that is closest to its aspect ratio, and behind them a small copy of it.

    Tiles come out one below the other, row by row: the result is one tile wide. Encoders of one size take them apart.
    Of layouts that fit equally well the larger one wins if the picture has more than half of its pixels (InternVL).

    Args:
        max_tiles: the most tiles, without the copy.
        min_tiles: the fewest.
        thumbnail: whether a picture of several tiles is followed by a copy of all of it in one tile.
        tile: side of a tile in pixels, for choosing the layout alone; encoder and teachers get the same tiles, each at
            its own size.

    Raises:
        ValueError: unless 1 ≤ `min_tiles` ≤ `max_tiles`.
    """

    def __init__(self, max_tiles: int = 12, min_tiles: int = 1, thumbnail: bool = True, tile: int = 448) -> None:
        if not 1 <= min_tiles <= max_tiles:
            raise ValueError(f"data.transform: min_tiles {min_tiles} and max_tiles {max_tiles} must be 1 ≤ min ≤ max")
        self.max_tiles, self.min_tiles, self.thumbnail, self.tile = max_tiles, min_tiles, thumbnail, tile

    def layout(self, size: Size) -> tuple[int, int]:
        """Columns and rows of tiles for a picture of this (width, height)."""
        width, height = size
        best, closest = (1, 1), float("inf")
        for columns, rows in _layouts(self.min_tiles, self.max_tiles):
            distance = abs(width / height - columns / rows)
            wins_tie = distance == closest and width * height > 0.5 * self.tile**2 * columns * rows
            if distance < closest or wins_tie:
                best, closest = (columns, rows), distance
        return best

    def fixed(self, pixels: PixelSpec) -> bool:
        """False, as the number of tiles depends on the picture."""
        return False

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result: one tile wide, as high as all tiles together.

        Raises:
            ValueError: as `side_of`.
        """
        side = side_of(self, pixels)
        columns, rows = self.layout(size)
        tiles = columns * rows
        return side, side * (tiles + (self.thumbnail and tiles > 1))

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor by which a picture is resized to the layout; its copy is smaller.

        Raises:
            ValueError: as `side_of`.
        """
        side = side_of(self, pixels)
        columns, rows = self.layout(size)
        return max(side * columns / size[0], side * rows / size[1])

    def __call__(self, image: PILImage.Image, pixels: PixelSpec, original: Size | None = None) -> Tensor:
        """Resize to the layout, cut into tiles, and add the copy: uint8 `[3, tiles · side, side]`.

        Raises:
            ValueError: as `side_of`.
        """
        side = side_of(self, pixels)
        columns, rows = self.layout(original or image.size)
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        whole = self.resize(picture, (side * columns, side * rows), pixels)
        tiles = in_column(whole, side)
        if self.thumbnail and columns * rows > 1:
            tiles = torch.cat([tiles, self.resize(picture, (side, side), pixels)], dim=1)
        return tiles.contiguous()

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize; the aspect ratio is not kept."""
        return bicubic(image, size)
