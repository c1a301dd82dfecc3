"""LinearPatches: images of any size, with a token after each row."""

from __future__ import annotations

import torch

from lit_vlm.core.batch import Images
from lit_vlm.encoders import LinearPatches

SIZES = ((4, 8), (8, 8), (12, 4), (4, 8), (4, 4))


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in SIZES]


def test_each_row_ends_in_the_learned_token() -> None:
    encoder = LinearPatches(width=5, patch=4)
    with torch.no_grad():
        result = encoder(Images.pack(pictures()))
    assert encoder.row_end is not None
    start = 0
    for grid, (height, width) in zip(result.grids, SIZES, strict=True):
        assert (grid.rows, grid.cols, grid.row_end) == (height // 4, width // 4, 1)
        block = result.features[start : start + grid.num_tokens].view(grid.rows, grid.cols + 1, 5)
        assert (block[:, -1] == encoder.row_end).all()
        assert not (block[:, :-1] == encoder.row_end).all(dim=-1).any()
        start += grid.num_tokens


def test_a_patch_is_the_linear_map_of_its_normalised_pixels() -> None:
    encoder = LinearPatches(width=5, patch=4, row_end=False)
    picture = pictures()[1]
    with torch.no_grad():
        features = encoder(Images.pack([picture])).features
        for row in range(2):
            for col in range(2):
                patch = picture[:, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4].float() / 127.5 - 1
                torch.testing.assert_close(features[2 * row + col], encoder.linear(patch.flatten()))


def test_the_dummy_is_one_patch() -> None:
    encoder = LinearPatches(width=5, patch=4)
    assert encoder.dummy_images().sizes == ((4, 4),)
    assert encoder(encoder.dummy_images()).features.shape == (2, 5)
    assert encoder.pixels.size is None
