"""Linear patches: no vision encoder at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.encoders.base import HALF, Encoder, PatchGrid


class LinearPatches(Encoder):
    """One linear map from the raw pixels of each patch, and a learned token after each row (Fuyu-8B, Adept 2023).

    It takes images of any size. With `projector: Identity`, set `width` to the width of the decoder. Fuyu itself closes
    rows with the vector of a word: `row_end: false` here, and `row_end` of the embedder `Splice`.

    Args:
        width: features per token.
        patch: pixels per patch side.
        row_end: whether a learned token closes each row, which tells the decoder where a row ends.
    """

    def __init__(self, width: int = 1024, patch: int = 30, row_end: bool = True) -> None:
        super().__init__()
        self.width = width
        self.patch_grid = PatchGrid(patch, row_end=int(row_end))
        self.pixels = PixelSpec(size=None, multiple=patch, mean=HALF)
        self.linear = nn.Linear(3 * patch * patch, width)
        self.row_end = nn.Parameter(torch.randn(width) * 0.02) if row_end else None
        self._set_normalisation(HALF, HALF)

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, row by row, each row closed by the row-end token where there is one."""
        parts: list[Tensor | None] = [None] * len(images)
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        for indices, pixels in images.groups():
            features = self._encode(pixels)  # [m, tokens, d_e]
            for index, part in zip(indices, features, strict=True):
                parts[index] = part
        return VisualTokens(torch.cat([part for part in parts if part is not None]), grids)

    def _encode(self, pixels: Tensor) -> Tensor:
        patch = self.patch_grid.patch
        x = self.normalise(pixels, self.linear.weight.dtype)
        m, _, height, width = x.shape
        rows, cols = height // patch, width // patch
        x = x.view(m, 3, rows, patch, cols, patch).permute(0, 2, 4, 1, 3, 5).reshape(m, rows, cols, -1)
        x = self.linear(x)
        if self.row_end is not None:
            x = torch.cat([x, self.row_end.to(x.dtype).expand(m, rows, 1, -1)], dim=2)
        return x.flatten(1, 2)
