"""The patch embedding of EVEv2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens, index_patches
from lit_vlm.encoders.base import CLIP_MEAN, CLIP_STD, Encoder, PatchGrid
from lit_vlm.encoders.windows import lay_out, pixel_windows


class EveV2PatchEmbedding(Encoder):
    """Two convolutions with a GELU between them, a learned CLS token and row ends (EVEv2, section 3).

    An image of any size that is a multiple of two patches gives 1 + rows · (cols + 1) tokens. There is no projector:
    use `Identity`, and set `width` to the width of the decoder.

    Args:
        width: features per token; that of the decoder.
        hidden: channels after the first convolution.
        patch: pixels per patch side; a token covers 2 × 2 patches.
    """

    def __init__(self, width: int = 3584, hidden: int = 1024, patch: int = 16) -> None:
        super().__init__()
        self.width, self.patch = width, patch
        self.patch_grid = PatchGrid(2 * patch, prefix=1, row_end=1)
        self.pixels = PixelSpec(size=None, multiple=2 * patch, mean=CLIP_MEAN)
        self.patch_embedding = nn.Sequential(
            nn.Conv2d(3, hidden, patch, stride=patch), nn.GELU(), nn.Conv2d(hidden, width, 2, stride=2)
        )
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.split_embedding = nn.Parameter(torch.randn(width))
        self._set_normalisation(CLIP_MEAN, CLIP_STD)

    def forward(self, images: Images) -> VisualTokens:
        """Tokens `[t, d_e]`: per image CLS, then row by row, each row closed by the row-end token."""
        first, act, second = self.patch_embedding
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        windows = self.normalise(pixel_windows(images, self.patch), first.weight.dtype)
        # Strides equal kernels, so both convolutions are linear maps of windows, whatever the images' sizes.
        cells = act(F.linear(windows.flatten(2), first.weight.flatten(1), first.bias))  # [windows, 4, hidden]
        weight = second.weight.permute(0, 2, 3, 1).flatten(1)
        features = F.linear(cells.flatten(1), weight, second.bias)
        cls = self.class_embedding.expand(len(grids), -1)
        return VisualTokens(lay_out(features, cls, self.split_embedding, index_patches(grids), grids), grids)
