"""Transforms that keep the shape of a picture within a number of pixels or of patches, as published encoders ask."""

from __future__ import annotations

import math

from torch import Tensor

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data.sample.transforms import ImageTransform, Size, bicubic, multiple_of


class _Budget(ImageTransform):
    """A transform of any size that bends the shape of a picture by less than the encoder's multiple."""

    def fixed(self, pixels: PixelSpec) -> bool:
        """Whether the size of the result is the same for all pictures: it never is."""
        return False

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the side that keeps most; raises as `size`."""
        return max(made / own for made, own in zip(self.size(size, pixels), size, strict=True))

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize."""
        return bicubic(image, size)


class NativeArea(_Budget):
    """Keep the shape within a range of areas, sides rounded to multiples: Qwen2-VL and after (arXiv 2409.12191, 2.1).

    A picture whose rounded sides are within the range is not scaled. A larger one is shrunk and its sides are rounded
    down, a smaller one is enlarged and its sides are rounded up. The area is in the range but for strips: no side is
    smaller than one multiple.

    Args:
        min_pixels: smallest area; 4 tokens of Qwen2-VL by default.
        max_pixels: largest area; 1280 tokens of Qwen2-VL by default.

    Raises:
        ValueError: when the smallest area is not between 1 and the largest.
    """

    def __init__(self, min_pixels: int = 56 * 56, max_pixels: int = 1280 * 28 * 28) -> None:
        if not 1 <= min_pixels <= max_pixels:
            raise ValueError(
                f"data.transform NativeArea: min_pixels {min_pixels} must be at least 1, and at most max_pixels "
                f"{max_pixels}"
            )
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result, multiples of the encoder's.

        Raises:
            ValueError: for an encoder of one size.
        """
        multiple = multiple_of(self, pixels)
        area = size[0] * size[1]
        width, height = (round(side / multiple) * multiple for side in size)
        if width * height > self.max_pixels:
            shrink = math.sqrt(area / self.max_pixels)
            width, height = (max(1, math.floor(side / shrink / multiple)) * multiple for side in size)
        elif width * height < self.min_pixels:
            enlarge = math.sqrt(self.min_pixels / area)
            width, height = (math.ceil(side * enlarge / multiple) * multiple for side in size)
        return width, height


class PatchBudget(_Budget):
    """As large as a number of patches allows, sides rounded up: SigLIP 2 NaFlex (arXiv 2502.14786, section 2.4.2).

    Small pictures are enlarged too, by a factor of 100 at most.

    Args:
        patches: most patches of a picture; SigLIP 2 was trained with 128 to 1024, and its processor makes 256.

    Raises:
        ValueError: for less than one patch.
    """

    def __init__(self, patches: int = 256) -> None:
        if patches < 1:
            raise ValueError(f"data.transform PatchBudget: patches {patches} must be at least 1")
        self.patches = patches

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result, multiples of the encoder's.

        Raises:
            ValueError: for an encoder of one size.
        """
        multiple = multiple_of(self, pixels)

        def cells(scale: float) -> Size:
            width, height = (max(1, math.ceil(side * scale / multiple)) for side in size)
            return width, height

        # The processor halves an interval of scales until it is this small; so does this, to be equal at the edges too.
        low, high, least = 1e-6, 100.0, 1e-5
        while high - low >= least:
            middle = (low + high) / 2
            if math.prod(cells(middle)) <= self.patches:
                low = middle
            else:
                high = middle
        across, down = cells(low)
        return across * multiple, down * multiple
