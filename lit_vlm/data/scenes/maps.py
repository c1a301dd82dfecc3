"""Exact targets of a scene, cell by cell: what a teacher of depth or segmentation would have to guess."""

from __future__ import annotations

import numpy as np

from lit_vlm.data.scenes.render import Rendering
from lit_vlm.data.scenes.surfaces import Floats
from lit_vlm.data.scenes.world import COLOURS, SHAPES, SIZES, Scene

DETAIL = 4
"""Depths per side of a cell."""
LOG_DEPTH = (1.8, 0.5)
"""About the mean and standard deviation of log depth in metres; targets are near 0 and 1."""
WIDTHS = {"depth": DETAIL**2, "segmentation": 1 + len(SHAPES) + len(COLOURS) + len(SIZES)}
"""Numbers per cell of each map."""
SHAPE_SHARES = slice(0, 1 + len(SHAPES))
"""Among the shares of a cell: background and shapes, which add up to 1."""


def cell_maps(scene: Scene, rendering: Rendering, cells: int) -> dict[str, Floats]:
    """Maps of a picture, `[cells, cells, width]` each.

    - `depth`: log depth, standardised, of 4 × 4 squares in each cell, row by row.
    - `segmentation`: which share of a cell is background, then each shape, each colour and each size.

    Args:
        scene: what the picture shows.
        rendering: the picture, whose side is a multiple of 4 · `cells`.
        cells: per side.
    """
    size = len(rendering.depth)
    side = size // (cells * DETAIL)
    depth = (np.log(rendering.depth) - LOG_DEPTH[0]) / LOG_DEPTH[1]
    depth = depth.reshape(cells, DETAIL, side, cells, DETAIL, side).mean((2, 5)).transpose(0, 2, 1, 3)
    kinds = np.zeros((len(scene.things) + 1, WIDTHS["segmentation"]), np.float32)
    kinds[0, 0] = 1
    for index, thing in enumerate(scene.things, 1):
        look = thing.look
        shape = 1 + SHAPES.index(look.shape)
        colour = 1 + len(SHAPES) + COLOURS.index(look.colour)
        kinds[index, [shape, colour, 1 + len(SHAPES) + len(COLOURS) + SIZES.index(look.size)]] = 1
    shares = kinds[rendering.segmentation]
    cell = size // cells
    shares = shares.reshape(cells, cell, cells, cell, -1).mean((1, 3))
    return {
        "depth": np.ascontiguousarray(depth.reshape(cells, cells, -1), np.float32),
        "segmentation": shares.astype(np.float32),
    }
