"""S2: one encoder at several scales."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lit_vlm.core.batch import Grid, Images
from lit_vlm.encoders import S2, HFEncoder
from tests.tiny import CLIP

INNER = partial(HFEncoder, config=CLIP)  # 28 pixels, 4 × 4 patches, 32 wide


def pictures(side: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).byte()


def test_each_scale_is_encoded_in_squares_put_together_and_averaged() -> None:
    encoder = S2(INNER, [28, 56]).eval()
    pixels = pictures(56)
    tokens = encoder(Images.pack(list(pixels)))
    assert encoder.width == 64
    assert encoder.pixels.size == 56
    assert tokens.grids == (Grid(4, 4),) * 2 == tuple(encoder.patch_grid(56, 56) for _ in range(2))
    low, high = tokens.features.split(32, dim=1)
    inner = encoder.inner
    for index, picture in enumerate(pixels):
        # By hand, one picture and one square at a time, on what the vision model itself takes.
        normal = inner.normalise(picture[None], torch.float32)
        small = F.interpolate(normal, (28, 28), mode="bicubic")
        expected = inner.backbone(small).last_hidden_state[0, 1:]
        torch.testing.assert_close(low[index * 16 : index * 16 + 16], expected, atol=1e-5, rtol=1e-4)
        whole = torch.zeros(8, 8, 32)
        for row in range(2):
            for col in range(2):
                square = normal[:, :, row * 28 : row * 28 + 28, col * 28 : col * 28 + 28]
                square_map = inner.backbone(square).last_hidden_state[0, 1:].view(4, 4, 32)
                whole[row * 4 : row * 4 + 4, col * 4 : col * 4 + 4] = square_map
        pooled = whole.view(4, 2, 4, 2, 32).mean((1, 3)).reshape(16, 32)
        torch.testing.assert_close(high[index * 16 : index * 16 + 16], pooled, atol=1e-5, rtol=1e-4)


def test_it_trains_unless_it_is_frozen() -> None:
    encoder = S2(INNER)
    encoder(Images.pack(list(pictures(56)))).features.sum().backward()
    assert all(p.grad is not None for p in encoder.blocks()[0].parameters())
    assert not encoder.requires_grad_(False)(Images.pack(list(pictures(56)))).features.requires_grad


@pytest.mark.parametrize("scales", [[56, 28], [28, 28], [28, 40], [14, 28]])
def test_scales_that_do_not_fit_are_refused(scales: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise and be multiples of the encoder's 28"):
        S2(INNER, scales)


def test_an_encoder_with_a_cls_token_is_refused() -> None:
    with pytest.raises(ValueError, match="patches only"):
        S2(partial(HFEncoder, config=CLIP, cls=True))
