"""The encoder slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_vlm.core.batch import Grid, Images, PixelSpec, VisualTokens
from lit_vlm.core.part import Part
from lit_vlm.encoders.layers import ReadLayers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class PatchGrid:
    """Maps the size of an image in pixels to the layout of its tokens.

    Attributes:
        patch: pixels per token side.
        prefix: tokens before the patches (a CLS token).
        row_end: tokens after each row.
    """

    patch: int
    prefix: int = 0
    row_end: int = 0

    def __call__(self, height: int, width: int) -> Grid:
        """Grid of an image of `height` × `width` pixels."""
        return Grid(height // self.patch, width // self.patch, self.prefix, self.row_end)


class Encoder(Part, ABC):
    """Pixels → visual tokens.

    A member sets `width`, `pixels` and `patch_grid` in its constructor and calls `_set_normalisation`; `forward` turns
    n images into the tokens that `patch_grid` promises.

    Attributes:
        width: features per token, d_e.
        pixels: what the encoder wants of an image.
        patch_grid: (height, width) of an image in pixels → layout of its tokens.
        layers: the layers that are read, where a setting chooses them.
        pixel_mean: `[3, 1, 1]`, mean of each colour channel, 0 to 1.
        pixel_std: `[3, 1, 1]`, standard deviation of each colour channel.
    """

    width: int
    pixels: PixelSpec
    patch_grid: PatchGrid
    layers: ReadLayers | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def identity(self) -> str:
        """The text of `Part.identity`, `pixels`, which decides the pictures that the encoder gets, and several layers.

        One layer is known by the number of blocks; of several, weights tell the last alone. Encoders inside count too.
        """
        read = [part.layers for part in self.modules() if isinstance(part, Encoder) and part.layers is not None]
        several = "".join(f" {layers}" for layers in read if len(layers.indices) > 1)
        return f"{super().identity()} {self.pixels}{several}"

    @abstractmethod
    def forward(self, images: Images) -> VisualTokens:
        """Features of all images, end to end: `[t, d_e]`."""

    def _set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 `[n, 3, h, w]` → the same shape in `dtype`, normalised by mean and deviation in fp32 on the device."""
        return ((pixels.float() / 255 - self.pixel_mean) / self.pixel_std).to(dtype)

    def tiles(self, images: Images) -> Tensor:
        """Cut all images into squares of the encoder's size, for encoders of one size.

        Args:
            images: each a square of that size, or a column of several (tiles, see `data.Tiles`).

        Returns:
            uint8 `[m, 3, size, size]`, image by image, from top to bottom.

        Raises:
            ValueError: as `check_sizes`.
        """
        side = self.check_sizes(images)
        parts: list[Tensor | None] = [None] * len(images)
        for indices, pixels in images.groups():
            cut = pixels.unflatten(2, (-1, side)).transpose(1, 2)  # [n, tiles, 3, size, size]
            if len(indices) == len(images):
                return cut.flatten(0, 1)
            for index, tiles in zip(indices, cut, strict=True):
                parts[index] = tiles
        return torch.cat([part for part in parts if part is not None])

    def check_sizes(self, images: Images) -> int:
        """Check that every image is a square of the encoder's size or a column of such tiles.

        Returns:
            side of the square in pixels.

        Raises:
            ValueError: naming the sizes of images that are neither, or of columns where there is a CLS token.
        """
        side = self.pixels.size
        assert side is not None
        wrong = {size for size in images.sizes if size[1] != side or size[0] % side}
        if wrong or (self.patch_grid.prefix and any(height != side for height, _ in images.sizes)):
            raise ValueError(
                f"{type(self).__name__} takes images of {side} × {side} pixels, found "
                f"{sorted(wrong or set(images.sizes))[:3]}; "
                "use a square transform (data.transform SquareCrop, PadSquare or Resize), or Tiles without a CLS token"
            )
        return side

    def check_multiples(self, images: Images) -> None:
        """Check that the sides of every image are multiples of `pixels.multiple`, for encoders of any size.

        Raises:
            ValueError: naming sizes that are not.
        """
        multiple = self.pixels.multiple
        wrong = {size for size in images.sizes if not all(size) or size[0] % multiple or size[1] % multiple}
        if wrong:
            raise ValueError(
                f"{type(self).__name__} takes images whose sides are multiples of {multiple} pixels, found "
                f"{sorted(wrong)[:3]}; use data.transform NativeArea, AreaLimit or Native"
            )

    def dummy_images(self) -> Images:
        """One image of the smallest size, for a batch without images: every rank must run every sharded part."""
        side = self.pixels.size or self.pixels.multiple
        return Images.pack([torch.zeros(3, side, side, dtype=torch.uint8, device=self.pixel_mean.device)])
