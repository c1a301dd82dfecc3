"""Image transforms: a decoded picture → uint8 pixels of the size that an encoder wants.

Normalisation is not done here: pixels travel as uint8 and the encoder normalises them on its device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.batch import PixelSpec

BICUBIC = PILImage.Resampling.BICUBIC


Size = tuple[int, int]
"""(width, height) in pixels."""


class ImageTransform(ABC):
    """RGB picture → uint8 `[3, h, w]`."""

    @abstractmethod
    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result for a picture of this size."""

    @abstractmethod
    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """By how much a picture of this size is shrunk: result over original, of the side that keeps most."""

    @abstractmethod
    def resize(self, image: PILImage.Image, size: Size, pixels: PixelSpec) -> PILImage.Image:
        """The picture at this size."""

    def __call__(self, image: PILImage.Image, pixels: PixelSpec, original: Size | None = None) -> Tensor:
        """Resize, and hand over as a tensor.

        Args:
            image: the picture.
            pixels: what the encoder wants.
            original: (width, height) of the picture, if it was decoded at a fraction of its size.
        """
        resized = self.resize(image, self.size(original or image.size, pixels), pixels)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


class _Square(ImageTransform):
    """To a square of the encoder's size."""

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """The encoder's square, whatever the picture."""
        side = _side(self, pixels)
        return side, side


def _side(transform: ImageTransform, pixels: PixelSpec) -> int:
    if pixels.size is None:
        raise ValueError(f"{type(transform).__name__} needs an encoder of one size; this one takes any: use Native")
    return pixels.size


def _middle(image: PILImage.Image, longest: int) -> PILImage.Image:
    """The middle of a very long picture."""
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class SquareCrop(_Square):
    """Shorter side to the size, then the square in the middle: LLaVA-1.5 stage 1, and CLIP's own preprocessing."""

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """The shorter side decides."""
        return _side(self, pixels) / min(size)

    def resize(self, image: PILImage.Image, size: Size, pixels: PixelSpec) -> PILImage.Image:
        """Bicubic resize and centre crop."""
        side = size[0]
        short = min(image.size)
        if max(image.size) > 16 * short:  # most would be resized only to be cut off
            image = _middle(image, 16 * short)
        width, height = image.size
        full = (side, int(side * height / short)) if width <= height else (int(side * width / short), side)
        resized = image.resize(full, BICUBIC)
        left, top = (full[0] - side) // 2, (full[1] - side) // 2
        return resized.crop((left, top, left + side, top + side))


class PadSquare(_Square):
    """Pad to a square with the encoder's mean colour, picture in the middle: LLaVA-1.5 stage 2, VILA-1.0."""

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """The longer side decides."""
        return _side(self, pixels) / max(size)

    def resize(self, image: PILImage.Image, size: Size, pixels: PixelSpec) -> PILImage.Image:
        """Pad, then resize (bicubic)."""
        width, height = image.size
        if width != height:
            longest = max(width, height)
            fill = tuple(int(channel * 255) for channel in pixels.mean)
            canvas = PILImage.new("RGB", (longest, longest), fill)
            canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
            image = canvas
        return image.resize(size, BICUBIC)


class Resize(_Square):
    """Squash to a square, whatever the aspect ratio: VILA-1.5."""

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """The shorter side is shrunk least."""
        return _side(self, pixels) / min(size)

    def resize(self, image: PILImage.Image, size: Size, pixels: PixelSpec) -> PILImage.Image:
        """Bicubic resize."""
        return image.resize(size, BICUBIC)


class Native(ImageTransform):
    """Keep the aspect ratio: the longer side at most `longest`, both sides a multiple of the encoder's patch.

    Args:
        longest: longer side in pixels; a larger picture is shrunk, a smaller one keeps its size.
    """

    def __init__(self, longest: int = 672) -> None:
        self.longest = longest

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """Each side is rounded up to a multiple, so that nothing is cut off."""
        scale = self.scale(size, pixels)
        limit = max(pixels.multiple, self.longest // pixels.multiple * pixels.multiple)
        width, height = (
            min(limit, max(1, -(-round(side * scale) // pixels.multiple)) * pixels.multiple) for side in size
        )
        return width, height

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """The longer side decides; nothing is enlarged."""
        return min(1.0, self.longest / max(size))

    def resize(self, image: PILImage.Image, size: Size, pixels: PixelSpec) -> PILImage.Image:
        """Bicubic resize."""
        return image.resize(size, BICUBIC)
