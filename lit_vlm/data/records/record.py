"""The canonical record: a conversation whose messages hold text and images, any number, anywhere.

The same shape as JSON is described by `record.schema.json` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool", "document"]
ROLES: tuple[str, ...] = get_args(Role)
MAX_PIXELS = 100_000_000
"""Most pixels of one image: a larger one is refused before it is decoded. 100 megapixels are 300 MB in memory."""
MAX_SIDE = 100_000
"""Longest side of one image in pixels. A resize holds the long side times the new short side in memory."""
MAX_DETAIL = 600
"""Most letters of a `RecordError`'s detail; a longer one, such as with a picture in base64, is cut in the middle."""


class RecordError(ValueError):
    """A record that cannot be used.

    Attributes:
        reason: a short code that bad samples are counted by.
        detail: what was found and what was expected, cut to `MAX_DETAIL` letters.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if len(detail) > MAX_DETAIL:
            head, tail = detail[: MAX_DETAIL - 240], detail[-200:]
            detail = f"{head}[... {len(detail) - len(head) - len(tail)} letters left out ...]{tail}"
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
    """An image, as a path (relative to the source's image folder) or as encoded bytes; or a frame of a video.

    Attributes:
        path: path of the file, a picture; with `moment` and without `data`, a video.
        data: encoded content of the picture.
        size: (width, height) of the upright picture in pixels, where it is known without decoding.
        maps: name → float32 `[rows, cols, width]`: exact targets of drawn scenes, such as depth. Only sources that draw
            their pictures have them; converted sets do not hold them.
        links: whether the file may be reached through a link that leaves the image folder.
        moment: of a frame, when it is shown: seconds from the first frame of its video. The frames of a video follow
            each other in a message, with ascending moments and with nothing but text between them.
    """

    path: str | None = None
    data: bytes | None = None
    size: tuple[int, int] | None = None
    maps: Mapping[str, NDArray[np.float32]] | None = field(default=None, compare=False, repr=False)
    links: bool = field(default=False, compare=False, repr=False)
    moment: float | None = None

    @property
    def in_video(self) -> bool:
        """Whether the pixels are in a video, and not in a picture."""
        return self.moment is not None and self.data is None and self.path is not None


Content = Text | Image


@dataclass(frozen=True)
class Message:
    """One turn. A `document` is raw text with images: no template is put around it. A `tool` tells what a call gave.

    Attributes:
        role: who speaks.
        content: texts and images in order.
    """

    role: Role
    content: tuple[Content, ...]

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
        urls: addresses in the web that its pictures and text come from, where its file says so.
        earlier: turns that a new caption took the place of, oldest first, without their images. Nothing is trained on
            them.

    Raises:
        RecordError: for text that cannot be written as UTF-8.
    """

    id: str
    source: str
    messages: tuple[Message, ...]
    options: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    earlier: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        """Refuse text with half a surrogate pair, which no file and no tokenizer takes."""
        try:
            turns = (*self.messages, *self.earlier)
            "".join([self.id, *self.options, *self.urls, *(message.text for message in turns)]).encode()
        except UnicodeEncodeError as error:
            raise RecordError("malformed", f"its text holds half a character: {error}") from error

    @property
    def images(self) -> list[Image]:
        """All images in order."""
        return [part for message in self.messages for part in message.content if isinstance(part, Image)]
