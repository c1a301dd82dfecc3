"""Image transforms: a decoded picture → uint8 pixels of the size that an encoder wants.

Normalisation is not done here: pixels travel as uint8 and the encoder normalises them on its device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.batch import PixelSpec
from lit_vlm.core.tiling import Tiling

Size = tuple[int, int]
"""(width, height) in pixels."""
MAX_CANVAS = 36_000_000
"""Most pixels of a square that a picture is padded to before it is shrunk: 108 MB."""


class ImageTransform(ABC):
    """How an RGB picture becomes uint8 pixels `[3, h, w]` for an encoder or teacher."""

    @abstractmethod
    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result for a picture of this size.

        Args:
            size: (width, height) of the picture in pixels.
            pixels: what the encoder or teacher wants.

        Raises:
            ValueError: where the transform does not go with the encoder or teacher.
        """

    def fixed(self, pixels: PixelSpec) -> bool:
        """Whether the size of the result is the same for all pictures."""
        return pixels.size is not None

    def tiling(self, size: Size) -> Tiling | None:
        """How the tiles of a picture of this (width, height) make it up, for embedders that put them together.

        None (the default) for a transform that makes no tiles, or whose tiles stay as they come.
        """
        return None

    @abstractmethod
    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor by which a picture of this size is resized: result over original, along the side that keeps most.

        Args:
            size: (width, height) of the picture in pixels.
            pixels: what the encoder or teacher wants.

        Raises:
            ValueError: where the transform does not go with the encoder or teacher.
        """

    @abstractmethod
    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Resize a picture.

        Args:
            image: uint8 `[3, h, w]`.
            size: (width, height) of the result.
            pixels: what the encoder or teacher wants.
        """

    def __call__(self, image: PILImage.Image, pixels: PixelSpec, original: Size | None = None) -> Tensor:
        """Resize a decoded picture: uint8 `[3, h, w]`.

        Args:
            image: the picture.
            pixels: what the encoder or teacher wants.
            original: (width, height) of the original, if it was decoded at a fraction of its size.

        Raises:
            ValueError: where the transform does not go with the encoder or teacher.
        """
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return self.resize(tensor, self.size(original or image.size, pixels), pixels).contiguous()


def bicubic(image: Tensor, size: Size) -> Tensor:
    """Bicubic resize with antialiasing, in integers: within a level or two of Pillow's, several times as fast.

    Args:
        image: uint8 `[3, h, w]`.
        size: (width, height) of the result.
    """
    width, height = size
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


class _Square(ImageTransform):
    """A transform whose result is a square of the encoder's size.

    Args:
        side: side of the square in pixels, for an encoder of any size; one of one size, or a teacher, keeps its own.
    """

    side: int | None = None

    def __init__(self, side: int | None = None) -> None:
        if side is not None:  # without it a transform is described as it always was, and prepared features stay
            self.side = side

    def fixed(self, pixels: PixelSpec) -> bool:
        """True, as all pictures become the same square."""
        return True

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """Width and height of the encoder's square, whatever the picture.

        Raises:
            ValueError: as `side_of`.
        """
        side = side_of(self, pixels, self.side)
        return side, side


def side_of(transform: ImageTransform, pixels: PixelSpec, given: int | None = None) -> int:
    """Side in pixels of the square that the encoder or teacher wants.

    Args:
        transform: the transform that needs a square, for the message.
        pixels: what the encoder or teacher wants.
        given: side for an encoder of any size.

    Raises:
        ValueError: when it takes any size and none is given, or one that does not fit.
    """
    name = f"data.transform {type(transform).__name__}"
    if pixels.size is not None:
        return pixels.size
    if given is None:
        square = ", or set init_args.side" if isinstance(transform, _Square) else ""
        raise ValueError(
            f"{name} needs an encoder of one size; this one takes any: use Native, or AspectGrid where a head has a "
            f"teacher of one size{square}"
        )
    if given < 1 or given % pixels.multiple:
        raise ValueError(f"{name}: side {given} is no multiple of the {pixels.multiple} that this encoder needs")
    return given


def multiple_of(transform: ImageTransform, pixels: PixelSpec) -> int:
    """What the sides of a picture are multiples of, for an encoder of any size.

    Args:
        transform: the transform that makes pictures of any size, for the message.
        pixels: what the encoder or teacher wants.

    Raises:
        ValueError: when it takes one size.
    """
    if pixels.size is not None:
        raise ValueError(
            f"data.transform {type(transform).__name__} needs an encoder of any size, and this encoder or teacher "
            f"takes {pixels.size} × {pixels.size} pixels: use SquareCrop, PadSquare or Resize, with init_args.side "
            "where the encoder takes any size and the teacher does not"
        )
    return pixels.multiple


def _middle(image: Tensor, width: int, height: int) -> Tensor:
    """The middle of a picture, of at most this size."""
    width, height = min(image.shape[2], width), min(image.shape[1], height)
    left, top = (image.shape[2] - width) // 2, (image.shape[1] - height) // 2
    return image[:, top : top + height, left : left + width]


def _on_canvas(image: Tensor, size: Size, left: int, top: int, pixels: PixelSpec) -> Tensor:
    """A picture on a canvas of this (width, height) in the encoder's mean colour."""
    height, width = image.shape[1:]
    if (width, height) == size:
        return image
    colour = torch.tensor([int(channel * 255) for channel in pixels.mean], dtype=torch.uint8)
    line = colour.repeat(size[0])  # rows are copied whole, which is much faster than pixel by pixel
    canvas = torch.empty(size[1], size[0] * 3, dtype=torch.uint8)
    bottom, right = top + height, left + width
    canvas[:top], canvas[bottom:] = line, line
    canvas[top:bottom, : 3 * left], canvas[top:bottom, 3 * right :] = line[: 3 * left], line[3 * right :]
    canvas[top:bottom, 3 * left : 3 * right] = image.permute(1, 2, 0).reshape(height, 3 * width)
    return canvas.view(size[1], size[0], 3).permute(2, 0, 1)


class SquareCrop(_Square):
    """Resize the shorter side to the square's, then crop the middle: LLaVA-1.5 stage 1, and CLIP's preprocessing."""

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the resize, which the shorter side decides; raises as `side_of`."""
        return side_of(self, pixels, self.side) / min(size)

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize and centre crop."""
        side, short = size[0], min(image.shape[1:])
        if max(image.shape[1:]) > 16 * short:  # most of the picture would be resized only to be cut off
            image = _middle(image, 16 * short, 16 * short)
        height, width = image.shape[1:]
        full = (side, int(side * height / short)) if width <= height else (int(side * width / short), side)
        return _middle(bicubic(image, full), side, side)


class PadSquare(_Square):
    """Pad to a square with the encoder's mean colour, picture in the middle: LLaVA-1.5 stage 2, VILA-1.0."""

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the resize, which the longer side decides; raises as `side_of`."""
        return side_of(self, pixels, self.side) / max(size)

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Pad, then resize (bicubic)."""
        height, width = image.shape[1:]
        side = max(width, height)
        if side**2 > MAX_CANVAS:
            return self._resize_strip(image, size, pixels)
        return bicubic(_on_canvas(image, (side, side), (side - width) // 2, (side - height) // 2, pixels), size)

    def _resize_strip(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Pad and resize a long picture without making its large square: shrink the long side, then pad the short one.

        A resize goes along the rows first, so for a wide picture the result is the same to the bit. A tall picture is
        turned first, which may change a pixel by a level or two.
        """
        height, width = image.shape[1:]
        if height > width:
            return self._resize_strip(image.transpose(1, 2), size[::-1], pixels).transpose(1, 2)
        narrow = bicubic(image, (size[0], height))
        return bicubic(_on_canvas(narrow, (size[0], width), 0, (width - height) // 2, pixels), size)


class Resize(_Square):
    """Squash to a square, whatever the aspect ratio: VILA-1.5."""

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the shorter side, which keeps most; raises as `side_of`."""
        return side_of(self, pixels, self.side) / min(size)

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize."""
        return bicubic(image, size)


OWN = {"squash": Resize(), "crop": SquareCrop()}
"""`PixelSpec.resize` of a teacher → the transform that it asks for."""


def transform_for(pixels: PixelSpec, transform: ImageTransform) -> ImageTransform:
    """The transform that a teacher asks for with `PixelSpec.resize`, or else the given one."""
    return transform if pixels.resize is None else OWN[pixels.resize]


class Native(ImageTransform):
    """Keep the aspect ratio: the longer side at most `longest`, both sides a multiple of the encoder's patch.

    Args:
        longest: longer side in pixels; a larger picture is shrunk, a smaller one keeps its size.
    """

    def __init__(self, longest: int = 672) -> None:
        self.longest = longest

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result; each side is rounded up to a multiple, so that nothing is cut off."""
        scale = self.scale(size, pixels)
        limit = max(pixels.multiple, self.longest // pixels.multiple * pixels.multiple)
        width, height = (
            min(limit, max(1, -(-round(side * scale) // pixels.multiple)) * pixels.multiple) for side in size
        )
        return width, height

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the resize, which the longer side decides; at most 1."""
        return min(1.0, self.longest / max(size))

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize."""
        return bicubic(image, size)


class AspectGrid(ImageTransform):
    """Resize the longer side to `longest` pixels, and the shorter one to whole cells, rounded up: EVE.

    Encoders of one size, such as EVE's teacher, get the same cells at their own scale, in the middle of a square of
    their mean colour. Small pictures are enlarged; the aspect ratio is bent by less than a cell, and nothing is cut.

    Args:
        longest: longer side in pixels: 672, or 1344 for high resolution.
        cells: cells along the longer side; the teacher's patches per side.

    Raises:
        ValueError: when `longest` does not divide into the cells.
    """

    def __init__(self, longest: int = 672, cells: int = 24) -> None:
        if cells < 1 or longest % cells:
            raise ValueError(f"data.transform: longest {longest} does not divide into {cells} cells")
        self.longest, self.cells = longest, cells

    def _cells(self, size: Size) -> tuple[int, int]:
        """Numbers of cells across and down for a picture of this (width, height)."""
        width, height = size
        if width > height:
            return self.cells, -(-self.cells * height // width)
        return -(-self.cells * width // height), self.cells

    def _cell(self, pixels: PixelSpec) -> int:
        """Side of a cell in pixels; raises ValueError where it does not go with the encoder or teacher."""
        side = pixels.size or self.longest
        cell, rest = divmod(side, self.cells)
        if rest or cell % pixels.multiple:
            raise ValueError(
                f"data.transform: {side} pixels in {self.cells} cells are {side / self.cells:g} pixels per cell; it "
                f"must be a multiple of the {pixels.multiple} that this encoder or teacher needs"
            )
        return cell

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result: whole cells, or the full square for encoders of one size.

        Raises:
            ValueError: when the side of a cell is no multiple of the pixels that the encoder or teacher needs.
        """
        cell = self._cell(pixels)
        across, down = (self.cells, self.cells) if pixels.size else self._cells(size)
        return across * cell, down * cell

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the side that keeps most; the shorter side is rounded up, so it may be that one.

        Raises:
            ValueError: as `size`.
        """
        across, down = self._cells(size)
        cell = self._cell(pixels)
        return max(across * cell / size[0], down * cell / size[1])

    def __call__(self, image: PILImage.Image, pixels: PixelSpec, original: Size | None = None) -> Tensor:
        """Resize to whole cells, for encoders of one size in the middle of their square: uint8 `[3, h, w]`.

        Raises:
            ValueError: as `size`.
        """
        cell = self._cell(pixels)
        across, down = self._cells(original or image.size)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        tensor = self.resize(tensor, (across * cell, down * cell), pixels)
        if pixels.size:
            left, top = (self.cells - across) // 2 * cell, (self.cells - down) // 2 * cell
            tensor = _on_canvas(tensor, (pixels.size, pixels.size), left, top, pixels)
        return tensor.contiguous()

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize."""
        return bicubic(image, size)


class AreaLimit(ImageTransform):
    """Shrink a picture to the area of a square of `side` pixels if it is larger; round sides to multiples: EVEv2.

    Args:
        side: side of the square in pixels: 800, or 1600 for high resolution.
    """

    def __init__(self, side: int = 800) -> None:
        self.side = side

    def size(self, size: Size, pixels: PixelSpec) -> Size:
        """(width, height) of the result; each side is rounded to the nearest multiple of the encoder's, at least 1."""
        scale, multiple = self.scale(size, pixels), pixels.multiple
        width, height = (max(round(side * scale / multiple), 1) * multiple for side in size)
        return width, height

    def scale(self, size: Size, pixels: PixelSpec) -> float:
        """Factor of the resize, before sides are rounded; at most 1."""
        return min(1.0, self.side / math.sqrt(size[0] * size[1]))

    def resize(self, image: Tensor, size: Size, pixels: PixelSpec) -> Tensor:
        """Bicubic resize."""
        return bicubic(image, size)
