"""EvePatchEmbedding: equal to the published layer, for any mix of sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_vlm.core.batch import Grid, Images, index_patches
from lit_vlm.encoders import EvePatchEmbedding, EveV2PatchEmbedding
from lit_vlm.encoders.windows import pixel_windows
from lit_vlm.projectors import MLP
from lit_vlm.testing import check_encoder
from tests.tiny import ROOT

SIZES = ((16, 24), (8, 8), (24, 8), (16, 24), (8, 48))


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return torch.load(ROOT / "tests" / "fixtures" / "eve.pt", weights_only=True)


def layer(published: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[EvePatchEmbedding, MLP]:
    encoder = EvePatchEmbedding(width=32, patch=4)
    encoder.load_state_dict(published["vision_tower"])
    projector = MLP(32, 48, depth=2)
    projector.load_state_dict({f"layers.{key}": value for key, value in published["mm_projector"].items()})
    return encoder.to(dtype), projector.to(dtype)


def windows_of(pixels: Tensor, patch: int) -> Tensor:
    """Windows of one picture by another route: as convolutions unfold it."""
    rows = pixels.unfold(1, 2 * patch, 2 * patch).unfold(2, 2 * patch, 2 * patch)  # [3, rows, cols, 2p, 2p]
    cells = rows.unfold(3, patch, patch).unfold(4, patch, patch)  # [3, rows, cols, 2, 2, p, p]
    return cells.permute(1, 2, 3, 4, 0, 5, 6).reshape(-1, 4, len(pixels), patch, patch)


def tokens_of(published: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, EvePatchEmbedding, MLP]:
    encoder, projector = layer(published, dtype)
    grids = [Grid(rows, cols, 1, 1) for rows, cols in published["patch_hw"]]
    windows = torch.cat([windows_of(pixels.to(dtype), 4) for pixels in published["pixels"]])
    return projector.layers(encoder.embed(windows, grids)), encoder, projector


@pytest.mark.parametrize(
    ("dtype", "key", "atol"), [(torch.float32, "tokens", 1e-5), (torch.float64, "tokens_f64", 1e-12)]
)
def test_tokens_equal_the_published_ones_of_a_padded_square(
    published: dict[str, Any], dtype: torch.dtype, key: str, atol: float
) -> None:
    tokens, _, _ = tokens_of(published, dtype)
    torch.testing.assert_close(tokens, torch.cat(published[key]), atol=atol, rtol=atol)


def test_gradients_equal_the_published_ones(published: dict[str, Any]) -> None:
    tokens, encoder, projector = tokens_of(published, torch.float32)
    tokens.backward(torch.cat(published["grad_out"]))
    expected = published["grads"]
    for name, parameter in encoder.named_parameters():
        compare(parameter.grad, expected[f"vision_tower.{name}"])
    for name, parameter in projector.named_parameters():
        compare(parameter.grad, expected[f"mm_projector.{name.removeprefix('layers.')}"])


def compare(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_both_attentions_equal_the_published_ones(published: dict[str, Any]) -> None:
    encoder, _ = layer(published)
    assert encoder.local_attention is not None
    assert encoder.global_attention is not None
    cells = published["ca1"]["feature_map"][0]
    windows = windows_of(cells, 1).flatten(2)  # [windows, 4, channels]
    found = encoder.local_attention(windows.mean(1), windows)
    torch.testing.assert_close(found, published["ca1"]["out"][0], atol=1e-5, rtol=1e-5)
    assert encoder.class_embedding is not None
    found = encoder.global_attention(encoder.class_embedding[None], published["ca2"]["patches"])
    torch.testing.assert_close(found, published["ca2"]["out"][0], atol=1e-5, rtol=1e-5)


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8) for h, w in SIZES]


MEMBERS = {
    "eve": lambda: EvePatchEmbedding(width=16, patch=4, num_heads=2),
    "eve without CA1": lambda: EvePatchEmbedding(width=16, patch=4, num_heads=2, local_attention=False),
    "eve without CA2": lambda: EvePatchEmbedding(width=16, patch=4, num_heads=2, global_attention=False),
    "eve_v2": lambda: EveV2PatchEmbedding(width=16, hidden=8, patch=4),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_each_form_keeps_the_contract(member: str) -> None:
    check_encoder(MEMBERS[member])


def test_without_ca1_a_token_is_the_mean_of_its_patches() -> None:
    encoder = EvePatchEmbedding(width=16, patch=4, local_attention=False, global_attention=False)
    picture = pictures()[0]
    with torch.no_grad():
        found = encoder(Images.pack([picture])).features.view(2, 4, 16)[:, :-1]
        convolved = encoder.patch_embedding(encoder.normalise(picture[None], torch.float32))
    expected = torch.nn.functional.avg_pool2d(convolved, 2)[0].permute(1, 2, 0)
    torch.testing.assert_close(found, expected)


def test_the_second_embedding_is_two_convolutions() -> None:
    encoder = EveV2PatchEmbedding(width=16, hidden=8, patch=4)
    picture = pictures()[0]
    with torch.no_grad():
        found = encoder(Images.pack([picture])).features
        expected = encoder.patch_embedding(encoder.normalise(picture[None], torch.float32))[0].permute(1, 2, 0)
    assert (found[0] == encoder.class_embedding).all()
    rows = found[1:].view(2, 4, 16)
    torch.testing.assert_close(rows[:, :-1], expected)
    assert (rows[:, -1] == encoder.split_embedding).all()


def test_windows_keep_the_order_of_images_of_mixed_sizes() -> None:
    found = pixel_windows(Images.pack(pictures()), 4)
    assert torch.equal(found, torch.cat([windows_of(picture, 4) for picture in pictures()]))


def test_patches_are_found_among_marks_of_all_kinds() -> None:
    grids = [Grid(2, 3, 1, 1), Grid(1, 1), Grid(3, 2, 2, 0), Grid(1, 2, 0, 1)]
    found = index_patches(grids)
    expected = []
    start = 0
    for image, grid in enumerate(grids):
        assert found.starts[image] == start
        expected += [
            (image, row, col, start + grid.prefix + row * (grid.cols + grid.row_end) + col)
            for row in range(grid.rows)
            for col in range(grid.cols)
        ]
        start += grid.num_tokens
    assert list(zip(*(column.tolist() for column in found[:4]), strict=True)) == expected
