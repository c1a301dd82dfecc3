"""The pictures of records: their files, their sizes from the header, and their pixels."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PILImage

from lit_vlm.data.records.png import without_notes
from lit_vlm.data.records.record import MAX_PIXELS, MAX_SIDE, Image, RecordError
from lit_vlm.data.records.videos import Videos, film_module

T = TypeVar("T")
TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""EXIF orientation → the transposition that turns a picture upright."""
MAX_PATH = 4096
"""Most letters of a path, as on Linux; so a picture in base64 is not looked for in the file system."""
FRAME_QUALITY = 95
"""Quality of the JPEG that a frame of a video becomes where its encoded content is asked for, as in converted sets."""
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, struct.error)
"""What Pillow raises for a file that it cannot read."""


def image_file(image: Image, folder: Path) -> Path:
    """The file of an image's path, which must lie in the folder.

    A link may leave the folder where the image's `links` says so, or inside the cache of the Hugging Face hub, where
    the files of `snapshots/REVISION` are links into `blobs` beside it. A path that leaves the folder by itself may not.

    Args:
        image: an image with a path.
        folder: the image folder, which the path is relative to.

    Raises:
        RecordError: `missing_image` or `outside_folder`.
    """
    path = image.path or ""
    if len(path) > MAX_PATH:
        raise RecordError("missing_image", f"{path[:80]!r}, of {len(path)} letters, is no path")
    try:
        file = folder / path
        if not file.resolve().is_relative_to(folder.resolve()):
            # `..` is worked out before links are followed, as behind a link it would mean another folder.
            file = Path(os.path.abspath(file))
            if not file.is_relative_to(os.path.abspath(folder)):
                raise RecordError(
                    "outside_folder",
                    f"{path} leaves the image folder {folder}; image_folder of the source sets another",
                )
            target = file.resolve()
            if not (image.links or _in_hub_cache([file, folder.resolve()], target)):
                raise RecordError(
                    "outside_folder",
                    f"{path} leaves the image folder {folder} by a link, to {target}; allow_links: true of the source "
                    "(--set allow_links=true) reads it",
                )
        exists = file.is_file()
    except RecordError:
        raise
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise RecordError("missing_image", f"{path[:80]!r} is no path: {error}") from error
    if not exists:
        raise RecordError("missing_image", f"{file} does not exist")
    return file


def _in_hub_cache(places: list[Path], target: Path) -> bool:
    """Whether one of the places lies below `snapshots`, and the target in `blobs` beside that."""
    above = [folder for place in places for folder in place.parents if folder.name == "snapshots"]
    return any(target.parent == (folder.parent / "blobs").resolve() for folder in above)


def image_bytes(image: Image, folder: Path, videos: Videos | None = None) -> bytes:
    """The encoded content of an image, read from its file where it is not in memory; of a frame of a video, a JPEG.

    Args:
        image: path, bytes or frame.
        folder: what the path is relative to.
        videos: keeps the video open for its next frame; default: it is opened for this frame alone.

    Raises:
        RecordError: `missing_image` or `outside_folder`, and as `Videos.frame`.
    """
    if image.data is not None:
        return image.data
    if image.in_video:
        encoded = io.BytesIO()
        _frame(image, folder, videos).save(encoded, "JPEG", quality=FRAME_QUALITY)
        return encoded.getvalue()
    try:
        return image_file(image, folder).read_bytes()
    except OSError as error:
        raise RecordError("missing_image", f"{image.path}: {error}") from error


def _frame(image: Image, folder: Path, videos: Videos | None) -> PILImage.Image:
    file, moment = image_file(image, folder), image.moment or 0.0
    if videos is not None:
        return videos.frame(file, moment)
    with Videos() as own:
        return own.frame(file, moment)


def image_size(image: Image, folder: Path) -> tuple[int, int]:
    """(width, height) in pixels of the upright picture, from the header of its file; of a video, from its first frame.

    Raises:
        RecordError: as `open_image`.
    """
    if image.size is not None:
        return image.size
    if image.in_video:
        size: tuple[int, int] = film_module().upright_size(image_file(image, folder))
        return size
    return _read(image, folder, _upright_size)


def open_image(image: Image, folder: Path) -> PILImage.Image:
    """Decode an image to RGB, upright, with transparent parts white; of an animation, the first frame.

    Raises:
        RecordError: `missing_image`, `outside_folder`, `corrupt_image`, `corrupt_video` or `too_large`.
    """
    return decode_image(image, folder)[0]


def decode_image(
    image: Image,
    folder: Path,
    scale: Callable[[tuple[int, int]], float] | None = None,
    videos: Videos | None = None,
) -> tuple[PILImage.Image, tuple[int, int]]:
    """Decode an image as `open_image` does; with `scale`, at a fraction of its size where that is enough.

    Args:
        image: path, bytes or frame.
        folder: what the path is relative to.
        scale: (width, height) of the original → factor by which it will be resized. A JPEG is then decoded at 1/2, 1/4
            or 1/8 of its size, as long as that leaves twice what is needed; it takes a fraction of the time.
        videos: keeps the video open for its next frame; default: it is opened for this frame alone.

    Returns:
        the picture, and (width, height) of the upright original.

    Raises:
        RecordError: as `open_image`.
    """
    if image.in_video:
        frame = _frame(image, folder, videos)
        return frame, frame.size

    def decode(opened: PILImage.Image) -> tuple[PILImage.Image, tuple[int, int]]:
        size = _upright_size(opened)
        needed = 2 * scale(size) if scale is not None else 1.0
        if needed <= 0.5 and opened.mode in ("RGB", "L"):
            width, height = opened.size
            opened.draft(opened.mode, (math.ceil(width * needed), math.ceil(height * needed)))
        opened.load()
        return upright_rgb(opened), size

    return _read(image, folder, decode)


def _read(image: Image, folder: Path, use: Callable[[PILImage.Image], T]) -> T:
    """Open a picture and return `use` of it; a PNG that fails is tried again without texts and profiles."""
    try:
        with _opened(image, folder) as opened:
            return use(opened)
    except RecordError as error:
        smaller = without_notes(image_bytes(image, folder)) if error.reason == "corrupt_image" else None
        if smaller is None:
            raise
    with _opened(replace(image, data=smaller), folder) as opened:
        return use(opened)


@contextmanager
def _opened(image: Image, folder: Path) -> Iterator[PILImage.Image]:
    """Open a picture's file, as a context manager; errors of Pillow inside the context become a `RecordError`."""
    file: Path | io.BytesIO = io.BytesIO(image.data) if image.data is not None else image_file(image, folder)
    name = image.path or "image bytes"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # the limit below is ours
            with PILImage.open(file) as opened:
                if opened.width * opened.height > MAX_PIXELS or max(opened.size) > MAX_SIDE:
                    size = f"{name}: {opened.width}×{opened.height}"
                    raise RecordError("too_large", f"{size}, over {MAX_PIXELS} pixels, or a side over {MAX_SIDE}")
                yield opened
    except PILImage.DecompressionBombError as error:
        raise RecordError("too_large", f"{name}: {error}") from error
    except UnidentifiedImageError as error:  # whose message holds an address in memory
        raise RecordError("corrupt_image", f"{name}: cannot identify image file") from error
    except UNREADABLE as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("corrupt_image", f"{name}: {error}") from error


def _orientation(opened: PILImage.Image) -> int:
    """The orientation tag of EXIF; 1, upright, where EXIF is damaged, as the pixels may still be whole."""
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except (*UNREADABLE, KeyError, TypeError, IndexError):
        return 1


def _upright_size(opened: PILImage.Image) -> tuple[int, int]:
    return (opened.height, opened.width) if _orientation(opened) in (5, 6, 7, 8) else opened.size


def upright_rgb(picture: PILImage.Image) -> PILImage.Image:
    """A picture turned as its EXIF data say, as 8-bit RGB with transparent parts white.

    Raises:
        RecordError: for pixels that are numbers of unknown range.
    """
    turn = TURNS.get(_orientation(picture))
    return _as_rgb(picture.transpose(turn) if turn is not None else picture)


def _as_rgb(picture: PILImage.Image) -> PILImage.Image:
    """A picture as 8-bit RGB, transparent parts white."""
    upright = _eight_bit(picture)
    if upright.mode in ("RGBa", "La"):  # alpha is multiplied into the colours
        upright = upright.convert("RGBA" if upright.mode == "RGBa" else "LA")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright if upright.mode == "RGBA" else upright.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _eight_bit(image: PILImage.Image) -> PILImage.Image:
    """Scale 16-bit greyscale to 8 bits, which Pillow would clip to white; other modes stay as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.mode == "F":
        raise RecordError("corrupt_image", "pixels are floating-point numbers of unknown range")
    values = np.asarray(image)
    if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
        raise RecordError("corrupt_image", "pixels are 32-bit numbers of unknown range")
    levels = (np.arange(65536) / 257).round().astype(np.uint8)  # a table: no copy of the picture in wider numbers
    return PILImage.fromarray(levels[values])
