"""The canonical record: a conversation whose messages hold text and images, any number, anywhere.

The same shape as JSON is described by `record.schema.json` beside this file.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from PIL import Image as PILImage

Role = Literal["system", "user", "assistant", "document"]
ROLES: tuple[str, ...] = get_args(Role)
TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""How a picture is turned upright, by the orientation that its EXIF tag names."""
MAX_PIXELS = 100_000_000
"""Of one image: a larger one is refused before it is decoded. 100 megapixels are 300 MB in memory."""


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        reason: a short code that bad samples are counted by.
        detail: what was found and what was expected.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Text:
    """A piece of text.

    Attributes:
        text: the text itself.
        loss: whether it is supervised; None leaves it to the role: assistants and documents are, others are not.
    """

    text: str
    loss: bool | None = None


@dataclass(frozen=True)
class Image:
    """An image, as a path (relative to the source's image folder) or as encoded bytes.

    Attributes:
        path: where the file is.
        data: what is in it.
        size: (width, height) of the upright picture in pixels, where it is known without decoding.
        maps: what else is known of the picture, float32 `[rows, cols, width]` by name: exact targets of drawn scenes.
            Only a source in memory hands them on; converted sets do not hold them.
    """

    path: str | None = None
    data: bytes | None = None
    size: tuple[int, int] | None = None
    maps: Mapping[str, NDArray[np.float32]] | None = field(default=None, compare=False, repr=False)


Part = Text | Image


@dataclass(frozen=True)
class Message:
    """One turn. A `document` is raw text with images: no template is put around it."""

    role: Role
    content: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text of the turn."""
        return "".join(part.text for part in self.content if isinstance(part, Text))


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        id: unique in its source.
        source: name of the source.
        messages: the turns.
        options: answers to choose from, when the last answer is scored as a multiple choice.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse text that no file and no tokenizer takes."""
        try:
            "".join([self.id, *self.options, *(message.text for message in self.messages)]).encode()
        except UnicodeEncodeError as error:
            raise RecordError("malformed", f"its text holds half a character: {error}") from error

    @property
    def images(self) -> list[Image]:
        """All images in order."""
        return [part for message in self.messages for part in message.content if isinstance(part, Image)]


def parse_record(raw: Any, source: str, default_id: str) -> Record:
    """A record from its JSON form.

    Raises:
        RecordError: naming the key that is wrong, what was found, and what was expected.
    """
    if not isinstance(raw, Mapping) or not isinstance(raw.get("messages"), list) or not raw["messages"]:
        raise RecordError("malformed", "a record is an object with a non-empty list 'messages'")
    messages = tuple(_parse_message(message, f"messages[{i}]") for i, message in enumerate(raw["messages"]))
    options = raw.get("options", [])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise RecordError("malformed", "'options' is a list of strings")
    identity = raw.get("id", default_id)
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise RecordError("malformed", f"'id' is a string or an integer, not {identity!r}")
    return Record(str(identity), source, messages, tuple(options))


def _parse_message(raw: Any, where: str) -> Message:
    if not isinstance(raw, Mapping):
        raise RecordError("malformed", f"{where} is an object with 'role' and 'content'")
    if raw.get("role") not in ROLES:
        raise RecordError("unknown_role", f"{where}.role is {raw.get('role')!r}; roles: {', '.join(ROLES)}")
    content = raw.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RecordError("malformed", f"{where}.content is a string or a list of parts")
    return Message(
        cast(Role, raw["role"]), tuple(_parse_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    )


def _parse_part(raw: Any, where: str) -> Part:
    kind = raw.get("type") if isinstance(raw, Mapping) else None
    if kind == "text" and isinstance(raw.get("text"), str) and isinstance(raw.get("loss"), bool | None):
        return Text(raw["text"], raw.get("loss"))
    if kind == "image" and isinstance(raw.get("image"), str) and raw["image"]:
        return Image(path=raw["image"])
    raise RecordError(
        "malformed",
        f"{where} is {str(raw)[:80]!r}; expected {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': PATH}}",
    )


def image_bytes(image: Image, folder: Path) -> bytes:
    """The encoded content.

    Raises:
        RecordError: `missing_image` or `outside_folder`.
    """
    if image.data is not None:
        return image.data
    try:
        return _inside(folder, image.path or "").read_bytes()
    except OSError as error:
        raise RecordError("missing_image", f"{image.path}: {error}") from error


def image_size(image: Image, folder: Path) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header; raises as `open_image` does."""
    if image.size is not None:
        return image.size
    with _opened(image, folder) as opened:
        return _upright_size(opened)


def open_image(image: Image, folder: Path) -> PILImage.Image:
    """Decode an image to RGB, upright; transparent parts become white, of several frames the first is taken.

    Raises:
        RecordError: `missing_image`, `outside_folder`, `corrupt_image` or `too_large`.
    """
    return decode_image(image, folder)[0]


def decode_image(
    image: Image, folder: Path, scale: Callable[[tuple[int, int]], float] | None = None
) -> tuple[PILImage.Image, tuple[int, int]]:
    """As `open_image`, and as much smaller as it may be.

    Args:
        image: path or bytes.
        folder: what the path is relative to.
        scale: by how much a picture of a given (width, height) will be shrunk. A JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size, as long as that leaves twice what is needed; it takes a fraction of the time.

    Returns:
        the picture, and (width, height) of the original, upright.
    """
    with _opened(image, folder) as opened:
        size = _upright_size(opened)
        needed = 2 * scale(size) if scale is not None else 1.0
        if needed <= 0.5 and opened.mode in ("RGB", "L"):
            width, height = opened.size
            opened.draft(opened.mode, (math.ceil(width * needed), math.ceil(height * needed)))
        opened.load()
        turn = TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
        turned = opened.transpose(turn) if turn is not None else opened
        upright = _eight_bit(turned)
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            layer = upright.convert("RGBA")
            canvas = PILImage.new("RGBA", layer.size, "white")
            return PILImage.alpha_composite(canvas, layer).convert("RGB"), size
        return (upright if upright.mode == "RGB" else upright.convert("RGB")), size


@contextmanager
def _opened(image: Image, folder: Path) -> Iterator[PILImage.Image]:
    """The file with its header read; what goes wrong inside becomes a `RecordError`."""
    file: Path | io.BytesIO = io.BytesIO(image.data) if image.data is not None else _inside(folder, image.path or "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)  # the limit below is ours
            with PILImage.open(file) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise RecordError(
                        "too_large",
                        f"{image.path or 'image'}: {opened.width}×{opened.height}, over {MAX_PIXELS} pixels",
                    )
                yield opened
    except PILImage.DecompressionBombError as error:
        raise RecordError("too_large", f"{image.path or 'image'}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, struct.error) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("corrupt_image", f"{image.path or 'image bytes'}: {error}") from error


def _upright_size(opened: PILImage.Image) -> tuple[int, int]:
    turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (opened.height, opened.width) if turned else opened.size


def _inside(folder: Path, path: str) -> Path:
    """The file of an image path, which must lie in the folder."""
    try:
        file = folder / path
        inside = file.resolve().is_relative_to(folder.resolve())
        exists = file.is_file()
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise RecordError("missing_image", f"{path[:80]!r} is no path: {error}") from error
    if not inside:
        raise RecordError("outside_folder", f"{path} leaves the image folder {folder}")
    if not exists:
        raise RecordError("missing_image", f"{file} does not exist")
    return file


def _eight_bit(image: PILImage.Image) -> PILImage.Image:
    """16-bit greyscale scaled to 8 bits, where Pillow would clip it to white; other modes as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.mode == "F":
        raise RecordError("corrupt_image", "pixels are floating-point numbers of unknown range")
    values = np.asarray(image).astype(np.int64)
    if values.max(initial=0) > 65535 or values.min(initial=0) < 0:
        raise RecordError("corrupt_image", "pixels are 32-bit numbers of unknown range")
    return PILImage.fromarray((values / 257).round().astype(np.uint8))
