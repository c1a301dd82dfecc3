"""Patches by one convolution with learned positions: the front of HoVLE and Mono-InternVL."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.encoders.base import IMAGENET_MEAN, IMAGENET_STD, Encoder, PatchGrid


class ConvPatches(Encoder):
    """One convolution whose stride is its kernel, and a learned position for each patch of a tile (HoVLE, section 3).

    A picture of several tiles, one below the other as `data.Tiles` lays them out, gives the tokens of each tile in
    turn; all tiles share the positions.

    Args:
        width: features per token; with `projectors.PatchMerge` or `Identity` that of the decoder.
        image_size: side of a tile in pixels.
        patch: pixels per patch side.
        trained_size: side in pixels of the tile that the positions were learnt for, where it is not `image_size`: they
            are resampled (bicubic).

    Raises:
        ValueError: when one of the two sizes is no multiple of `patch`.
    """

    def __init__(
        self, width: int = 2048, image_size: int = 448, patch: int = 14, trained_size: int | None = None
    ) -> None:
        super().__init__()
        if image_size % patch or (trained_size or image_size) % patch:
            raise ValueError(
                f"ConvPatches: image_size {image_size} and trained_size must be multiples of patch {patch}"
            )
        self.width, self.patch = width, patch
        self.side, self.trained_side = image_size // patch, (trained_size or image_size) // patch
        self.patch_grid = PatchGrid(patch)
        self.pixels = PixelSpec(size=image_size, multiple=patch, mean=IMAGENET_MEAN)
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        nn.init.normal_(self.patch_embedding.weight, std=0.02)
        assert self.patch_embedding.bias is not None
        nn.init.zeros_(self.patch_embedding.bias)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.trained_side**2, width))
        # Published weights have a CLS token, and a position for it, that the model never uses: kept to be written back.
        self.register_buffer("class_embedding", torch.zeros(1, 1, width))
        self._set_normalisation(IMAGENET_MEAN, IMAGENET_STD)

    def forward(self, images: Images) -> VisualTokens:
        """Patches `[t, d_e]`: tile by tile, row by row.

        Raises:
            ValueError: as `check_sizes`.
        """
        self.check_sizes(images)
        parts: list[Tensor | None] = [None] * len(images)
        for indices, pixels in images.groups():
            features = self.embed(self.normalise(pixels, self.patch_embedding.weight.dtype))
            for index, tokens in zip(indices, features, strict=True):
                parts[index] = tokens
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        return VisualTokens(torch.cat([part for part in parts if part is not None]), grids)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[m, 3, h, w]` of one size → `[m, patches, d_e]`."""
        tokens = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return (tokens.unflatten(1, (-1, self.side**2)) + self._positions()).flatten(1, 2)

    def _positions(self) -> Tensor:
        """Position embeddings of the patches of one tile: `[patches, d_e]`."""
        table = self.position_embedding[0, 1:]
        if self.side == self.trained_side:
            return table
        square = table.float().unflatten(0, (self.trained_side, -1)).permute(2, 0, 1)[None]
        resampled = F.interpolate(square, (self.side, self.side), mode="bicubic", align_corners=False)
        return resampled[0].flatten(1).T.to(table.dtype)
