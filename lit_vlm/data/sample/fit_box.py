"""FitBox: pictures in their own pixels as far as a box has room for them, padded to whole patches; used by Fuyu."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data.sample.transforms import ImageTransform, Size, multiple_of

FILL = 1
"""Level of padded pixels, of 255. Fuyu's processor pads with 1.0 before it divides by 255, so it is nearly black."""


class FitBox(ImageTransform):
    """Shrink a picture that a box is too small for, keep its aspect ratio, and pad right and bottom to whole patches.

    It does what Fuyu-8B's image processor does: nothing is enlarged, no aspect ratio is bent, nothing is cut off.

    Args:
        width: width of the box in pixels.
        height: height of the box in pixels.

    Raises:
        ValueError: for a box without pixels.
    """

    def __init__(self, width: int = 1920, height: int = 1080) -> None:
        if width < 1 or height < 1:
            raise ValueError(f"data.transform FitBox: width and height are {width} and {height}; both must be above 0")
        self.width, self.height = width, height

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the padded picture; each side is rounded up to a multiple of the encoder's patch.

        Raises:
            ValueError: for an encoder or teacher of one size.
        """
        multiple = multiple_of(self, pixels)
        width, height = (-(-side // multiple) * multiple for side in self._inside(size))
        return width, height

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the resize; at most 1. Raises as `size`."""
        multiple_of(self, pixels)
        return min(1.0, self.height / size[1], self.width / size[0])

    def __call__(self, image: PILImage.Image, pixels: PixelSpec, original: Size | None = None) -> Tensor:
        """Resize, then pad: uint8 `[3, h, w]`; raises as `size`."""
        size = original or image.size
        across, down = self.size(size, pixels)
        tensor = self.resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), self._inside(size), pixels)
        height, width = tensor.shape[1:]
        return F.pad(tensor, (0, across - width, 0, down - height), value=FILL).contiguous()

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bilinear resize with antialiasing, in integers; a picture of this size stays as it is."""
        width, height = size
        if image.shape[1:] == (height, width):
            return image
        return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]

    def _inside(self, size: Size) -> Size:
        """(width, height) of the picture before it is padded, rounded down; a very long one keeps a pixel."""
        if size[0] <= self.width and size[1] <= self.height:
            return size
        scale = min(self.height / size[1], self.width / size[0])
        return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
