"""Exact depth and segmentation of a scene, cell by cell: targets that a teacher network would only estimate."""

from __future__ import annotations

import numpy as np

from lit_vlm.worlds.scenes.render import Rendering
from lit_vlm.worlds.scenes.surfaces import Floats
from lit_vlm.worlds.scenes.world import COLOURS, SHAPES, SIZES, Scene

DEPTHS = 16
"""Ranges of depth, equally wide in log depth."""
NEAREST, FARTHEST = 2.0, 14.0
"""Bounds of the depth ranges in metres; what is nearer or farther counts to the first or last range."""
WIDTHS = {"depth": DEPTHS, "segmentation": 1 + len(SHAPES) + len(COLOURS) + len(SIZES)}
"""Numbers per cell of each map."""
SHAPE_SHARES = slice(0, 1 + len(SHAPES))
"""The columns of the segmentation map that hold background and shapes, which add up to 1."""


def cell_maps(scene: Scene, rendering: Rendering, cells: int) -> dict[str, Floats]:
    """Maps of a picture, `[cells, cells, width]` each.

    - `depth`: which share of a cell lies in each of 16 ranges of log depth. A share for each range, and not the depth
      itself, because predictors end in a norm over channels, which would take a cell's mean depth away.
    - `segmentation`: which share of a cell is background, then each shape, each colour and each size.

    Args:
        scene: what the picture shows.
        rendering: the picture, whose side is a multiple of `cells`.
        cells: cells per side.

    Returns:
        the float32 maps by name; their widths are `WIDTHS`.
    """
    size = len(rendering.depth)
    cell = size // cells
    place = np.log(rendering.depth / NEAREST) / np.log(FARTHEST / NEAREST)
    ranges = np.eye(DEPTHS, dtype=np.float32)[np.clip((place * DEPTHS).astype(int), 0, DEPTHS - 1)]
    depth = ranges.reshape(cells, cell, cells, cell, DEPTHS).mean((1, 3))
    kinds = np.zeros((len(scene.things) + 1, WIDTHS["segmentation"]), np.float32)
    kinds[0, 0] = 1
    for index, thing in enumerate(scene.things, 1):
        look = thing.look
        shape = 1 + SHAPES.index(look.shape)
        colour = 1 + len(SHAPES) + COLOURS.index(look.colour)
        kinds[index, [shape, colour, 1 + len(SHAPES) + len(COLOURS) + SIZES.index(look.size)]] = 1
    shares = kinds[rendering.segmentation]
    shares = shares.reshape(cells, cell, cells, cell, -1).mean((1, 3))
    return {
        "depth": depth.astype(np.float32),
        "segmentation": shares.astype(np.float32),
    }
