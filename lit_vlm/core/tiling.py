"""Pictures of several tiles that are put together again: how the tiles of one make it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lit_vlm.core.batch import Grid


class Tiling(NamedTuple):
    """How the tiles of a picture, which travel one below the other, make it up.

    A copy of the whole picture in one tile comes first, then `rows` × `cols` tiles row by row. In these the picture
    keeps its aspect ratio and lies in the middle: along one axis it reaches their border, along the other there is
    padding.

    Attributes:
        rows: tiles below each other.
        cols: tiles beside each other.
        height: of the picture in pixels, before it was resized.
        width: of the picture in pixels, before it was resized.
    """

    rows: int
    cols: int
    height: int
    width: int

    def patches(self, side: int) -> tuple[int, int]:
        """Rows and columns of the patches that are not padding alone, from the middle (LLaVA-NeXT, "unpad").

        What is left out on one side is as much as on the other, so there may be one row or column of padding too many.

        Args:
            side: patches along the side of a tile.
        """
        rows, cols = self.rows * side, self.cols * side
        if self.width / self.height > cols / rows:
            seen = int(round(self.height * (cols / self.width), 7))  # 7 digits, as published
            return rows - (rows - seen) // 2 * 2, cols
        seen = int(round(self.width * (rows / self.height), 7))
        return rows, cols - (cols - seen) // 2 * 2


TileMap = Callable[["Grid", Tiling], "Grid"]
"""(Layout of a picture's tiles one below the other, how these make it up) → layout in the decoder's sequence."""


def as_they_come(grid: Grid, tiling: Tiling) -> Grid:
    """The layout unchanged: tiles stay one below the other, padding and all."""
    return grid
