"""AnyRes: a small copy of a picture, and the picture in its own aspect ratio on the best of a few grids of tiles."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.batch import PixelSpec
from lit_vlm.core.tiling import Tiling
from lit_vlm.data.sample.tiles import in_column
from lit_vlm.data.sample.transforms import ImageTransform, Size, bicubic, side_of

LAYOUTS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
"""(columns, rows) of LLaVA-1.6's `image_grid_pinpoints`, in their order, which decides between equals."""


class AnyRes(ImageTransform):
    """A small copy of the picture, then the picture with black padding on the best of some grids of tiles: LLaVA-NeXT.

    The best grid shows the most pixels of the picture; of equals, it has the least padding, and then comes first.
    Tiles come one below the other, row by row. `embedders.SpliceTiles` puts them together and leaves the padding out.

    Args:
        layouts: [columns, rows] of the grids; null: those of LLaVA-1.6, 2 × 1, 1 × 2, 2 × 2, 1 × 3 and 3 × 1.
        tile: side of a tile in pixels, for choosing the layout alone; encoder and teachers get the same tiles, each at
            its own size.

    Raises:
        ValueError: for no layout, one that is no pair of positive numbers, or a `tile` below 1.
    """

    def __init__(self, layouts: list[list[int]] | None = None, tile: int = 336) -> None:
        chosen = [list(pair) for pair in LAYOUTS] if layouts is None else layouts
        if not chosen or any(len(pair) != 2 or min(pair) < 1 for pair in chosen) or tile < 1:
            raise ValueError(
                f"data.transform: layouts {layouts} and tile {tile}: give pairs [columns, rows] of tiles, such as "
                "[[2, 1], [1, 2], [2, 2]], and the side of a tile in pixels"
            )
        self.layouts, self.tile = chosen, tile

    def layout(self, size: Size) -> tuple[int, int]:
        """Columns and rows of tiles for a picture of this (width, height)."""
        width, height = size
        best, shown, spare = (0, 0), -1, 0
        for columns, rows in self.layouts:
            across, down = columns * self.tile, rows * self.tile
            scale = min(across / width, down / height)
            found = min(int(width * scale) * int(height * scale), width * height)
            if found > shown or (found == shown and across * down - found < spare):
                best, shown, spare = (columns, rows), found, across * down - found
        return best

    def tiling(self, size: Size) -> Tiling:
        """How the tiles of a picture of this (width, height) make it up."""
        columns, rows = self.layout(size)
        return Tiling(rows, columns, size[1], size[0])

    def fixed(self, pixels: PixelSpec) -> bool:
        """False, as the number of tiles depends on the picture."""
        return False

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result: one tile wide, as high as the copy and all tiles together.

        Raises:
            ValueError: as `side_of`.
        """
        side = side_of(self, pixels)
        columns, rows = self.layout(size)
        return side, side * (1 + columns * rows)

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """The larger of two factors: that of the picture on its tiles, and that of its shorter side in the copy.

        Raises:
            ValueError: as `side_of`.
        """
        side = side_of(self, pixels)
        columns, rows = self.layout(size)
        return max(min(columns * side / size[0], rows * side / size[1]), side / min(size))

    def __call__(self, image: PILImage.Image, pixels: PixelSpec, original: Size | None = None) -> Tensor:
        """Make the copy, resize to the layout, pad, and cut into tiles: uint8 `[3, (1 + tiles) · side, side]`.

        Raises:
            ValueError: as `side_of`.
        """
        side, size = side_of(self, pixels), original or image.size
        columns, rows = self.layout(size)
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        width, height = inner_size(size, (side * columns, side * rows))
        left, top = (side * columns - width) // 2, (side * rows - height) // 2
        whole = torch.zeros(3, side * rows, side * columns, dtype=torch.uint8)
        whole[:, top : top + height, left : left + width] = self.resize(picture, (width, height), pixels)
        return torch.cat([self.resize(picture, (side, side), pixels), in_column(whole, side)], dim=1)

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize; the copy loses the aspect ratio."""
        return bicubic(image, size)


def inner_size(size: Size, canvas: Size) -> Size:
    """(width, height) of a picture that is resized to reach the border of a canvas in its own aspect ratio."""
    across, down = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return canvas[0], min(math.ceil(size[1] * across), canvas[1])
    return min(math.ceil(size[0] * down), canvas[0]), canvas[1]
