"""Tiles: InternVL's dynamic resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data import Tiles
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.transforms import bicubic
from lit_vlm.encoders.base import PatchGrid
from lit_vlm.projectors.base import same_grid
from lit_vlm.projectors.downsample import Fold

PIXELS = PixelSpec(size=448, multiple=14, mean=(0.5, 0.5, 0.5))
SMALL = PixelSpec(size=28, multiple=7, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("size", "most", "layout"),
    [
        ((448, 448), 12, (1, 1)),
        ((800, 800), 12, (2, 2)),  # ties between squares: enough pixels for 4 tiles, not for 9
        ((600, 600), 12, (1, 1)),  # 360,000 pixels are less than half of 4 tiles
        ((1200, 1200), 12, (3, 3)),
        ((1200, 1200), 6, (2, 2)),
        ((800, 600), 12, (4, 3)),
        ((800, 600), 6, (3, 2)),  # 4:3 lies closer to 3:2 than to 1:1
        ((600, 800), 12, (3, 4)),
        ((100, 3000), 12, (1, 12)),
        ((1000, 500), 12, (2, 1)),  # ties with 4 × 2, whose half it does not fill
        ((1800, 900), 12, (4, 2)),
    ],
)
def test_the_layout_that_fits_best(size: tuple[int, int], most: int, layout: tuple[int, int]) -> None:
    assert Tiles(max_tiles=most).layout(size) == layout


def test_tiles_come_row_by_row_with_the_copy_behind_them() -> None:
    transform = Tiles(max_tiles=6)
    picture = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    image = PILImage.fromarray(picture)
    assert transform.layout(image.size) == (3, 2)
    result = transform(image, SMALL)
    assert tuple(result.shape) == (3, 28 * 7, 28)
    assert transform.size(image.size, SMALL) == (28, 28 * 7)
    whole = bicubic(torch.from_numpy(picture).permute(2, 0, 1), (84, 56))
    for number in range(6):
        row, col = divmod(number, 3)
        tile = whole[:, 28 * row : 28 * (row + 1), 28 * col : 28 * (col + 1)]
        assert torch.equal(result[:, 28 * number : 28 * (number + 1)], tile)
    assert torch.equal(result[:, -28:], bicubic(torch.from_numpy(picture).permute(2, 0, 1), (28, 28)))


def test_one_tile_has_no_copy_and_copies_can_be_left_out() -> None:
    assert Tiles().size((500, 500), PIXELS) == (448, 448)
    assert Tiles(thumbnail=False).size((1800, 900), PIXELS) == (448, 448 * 8)
    assert not Tiles().fixed(PIXELS)
    with pytest.raises(ValueError, match="must be 1 ≤ min ≤ max"):
        Tiles(max_tiles=2, min_tiles=3)
    with pytest.raises(ValueError, match="needs an encoder of one size"):
        Tiles().size((500, 500), PixelSpec(None, 14, (0.5, 0.5, 0.5)))


def test_tiles_whose_patches_would_be_merged_with_the_next_tile_s_are_refused() -> None:
    pixels = PixelSpec(size=28, multiple=4, mean=(0.5, 0.5, 0.5))
    odd = InputSpec(None, pixels, PatchGrid(4), Fold(2))
    assert odd.grid(28, 28).num_tokens == 16
    with pytest.raises(ValueError, match=r"tiles of 7 × 7 patches, and the projector .* would merge"):
        odd.grid(84, 28)
    assert InputSpec(None, pixels, PatchGrid(4), same_grid).grid(84, 28).num_tokens == 3 * 49
    assert InputSpec(None, pixels, PatchGrid(7), Fold(2)).grid(84, 28).num_tokens == 3 * 4
