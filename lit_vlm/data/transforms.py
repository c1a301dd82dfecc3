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


class ImageTransform(ABC):
    """RGB picture → uint8 `[3, h, w]`."""

    @abstractmethod
    def resize(self, image: PILImage.Image, pixels: PixelSpec) -> PILImage.Image:
        """The picture at the size that `pixels` asks for."""

    def __call__(self, image: PILImage.Image, pixels: PixelSpec) -> Tensor:
        """Resize, and hand over as a tensor."""
        return torch.from_numpy(np.array(self.resize(image, pixels))).permute(2, 0, 1).contiguous()


def _side(transform: ImageTransform, pixels: PixelSpec) -> int:
    if pixels.size is None:
        raise ValueError(f"{type(transform).__name__} needs an encoder of one size; this one takes any: use Native")
    return pixels.size


def _middle(image: PILImage.Image, longest: int) -> PILImage.Image:
    """The middle of a very long picture."""
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class SquareCrop(ImageTransform):
    """Shorter side to the size, then the square in the middle: LLaVA-1.5 stage 1, and CLIP's own preprocessing."""

    def resize(self, image: PILImage.Image, pixels: PixelSpec) -> PILImage.Image:
        """Bicubic resize and centre crop."""
        side = _side(self, pixels)
        short = min(image.size)
        if max(image.size) > 16 * short:  # most would be resized only to be cut off
            image = _middle(image, 16 * short)
        width, height = image.size
        size = (side, int(side * height / short)) if width <= height else (int(side * width / short), side)
        resized = image.resize(size, BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        return resized.crop((left, top, left + side, top + side))


class PadSquare(ImageTransform):
    """Pad to a square with the encoder's mean colour, picture in the middle: LLaVA-1.5 stage 2, VILA-1.0."""

    def resize(self, image: PILImage.Image, pixels: PixelSpec) -> PILImage.Image:
        """Pad, then resize (bicubic)."""
        side = _side(self, pixels)
        width, height = image.size
        if width != height:
            longest = max(width, height)
            fill = tuple(int(channel * 255) for channel in pixels.mean)
            canvas = PILImage.new("RGB", (longest, longest), fill)
            canvas.paste(image, ((longest - width) // 2, (longest - height) // 2))
            image = canvas
        return image.resize((side, side), BICUBIC)


class Resize(ImageTransform):
    """Squash to a square, whatever the aspect ratio: VILA-1.5."""

    def resize(self, image: PILImage.Image, pixels: PixelSpec) -> PILImage.Image:
        """Bicubic resize."""
        side = _side(self, pixels)
        return image.resize((side, side), BICUBIC)


class Native(ImageTransform):
    """Keep the aspect ratio: the longer side at most `longest`, both sides a multiple of the encoder's patch.

    Args:
        longest: longer side in pixels; a larger picture is shrunk, a smaller one keeps its size.
    """

    def __init__(self, longest: int = 672) -> None:
        self.longest = longest

    def resize(self, image: PILImage.Image, pixels: PixelSpec) -> PILImage.Image:
        """Bicubic resize; each side is rounded up to a multiple, so that nothing is cut off."""
        width, height = image.size
        scale = min(1.0, self.longest / max(width, height))
        limit = max(pixels.multiple, self.longest // pixels.multiple * pixels.multiple)
        size = [
            min(limit, max(1, -(-round(side * scale) // pixels.multiple)) * pixels.multiple) for side in (width, height)
        ]
        return image.resize((size[0], size[1]), BICUBIC)
