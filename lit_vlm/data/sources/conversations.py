"""Conversations in JSON: the chat form of Hugging Face, and LLaVA's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Literal

from lit_vlm.data.records import Image, Message, Record, RecordError, Role, Text
from lit_vlm.data.records.media import IMAGE_KEYS, MARK, refuse_calls, refuse_marks, refuse_unread, row_images, urls_of
from lit_vlm.data.records.parsing import parse_record
from lit_vlm.data.sources.base import JsonLines

ImagePosition = Literal["front", "in_place", "spaced"]

LLAVA_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


class ChatJsonl(JsonLines):
    """Chat form of Hugging Face: `messages` of `role` and `content`, one record per line, or a JSON list of them.

    The variants of ms-swift, LLaMA-Factory and OpenAI are read too, and `texts` or `query` in place of `messages`: see
    `lit_vlm.data.records.parsing.parse_record`.

    Args:
        path: the .jsonl or .json file, or a folder of .jsonl files.
        image_folder: what image paths are relative to; default: the folder of the file.
        name: name of the source; default: that of the file.
        allow_links: whether image files may be links that leave the image folder.
        ignore_keys: keys that are removed from the rows, and from the turns and parts in them, before they are read:
            for keys that look like a picture, a film or a sound and are none.

    Raises:
        ValueError: for a path that does not exist or holds no such file.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        name: str | None = None,
        allow_links: bool = False,
        ignore_keys: list[str] | None = None,
    ) -> None:
        super().__init__(path, image_folder, name, allow_links, ignore_keys)

    def record(self, index: int) -> Record:
        """The record of one line.

        Raises:
            RecordError: as `parse_record`, or for a line that is not JSON.
        """
        return parse_record(self.json(index), self.name, str(index), self.allow_links)


class LlavaJson(JsonLines):
    """LLaVA's form: a JSON list of `{id, image, conversations: [{from: human|gpt, value}]}`, `<image>` in the text.

    `image` (or `images`) is a path or a list of paths, used in the order of the marks. The samples may also stand one
    per line, as InternVL has them.

    Args:
        path: the .json or .jsonl file, or a folder of .jsonl files.
        image_folder: what image paths are relative to; default: the folder of the file.
        image_position: `front` moves a turn's image before its text, followed by a newline, as LLaVA-1.5 does;
            `in_place` leaves images where their marks stand; `spaced` leaves them there too, but writes a space in
            front of each and a newline behind it in place of the white space there, and puts the images of a sample
            without marks in front, as VILA-1.5 does.
        system: system text of conversations that have none; "" for none at all; default: the template's.
        name: name of the source; default: that of the file.
        allow_links: whether image files may be links that leave the image folder.
        ignore_keys: keys that are removed from the rows, and from the turns and parts in them, before they are read:
            for keys that look like a picture, a film or a sound and are none.

    Raises:
        ValueError: for a path that does not exist or holds no such file.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        image_position: ImagePosition = "front",
        system: str | None = None,
        name: str | None = None,
        allow_links: bool = False,
        ignore_keys: list[str] | None = None,
    ) -> None:
        super().__init__(path, image_folder, name, allow_links, ignore_keys)
        self.image_position, self.system = image_position, system

    def record(self, index: int) -> Record:
        """The record of one entry.

        Raises:
            RecordError: as `llava_record` and `row_images`, or for an entry that is not JSON.
        """
        raw = self.json(index)
        images = row_images(raw, self.allow_links) if isinstance(raw, dict) else []
        return with_system(llava_record(raw, self.name, index, images, self.image_position), self.system)


def with_system(record: Record, system: str | None) -> Record:
    """Add a system text to a record that has none of its own; None adds nothing."""
    if system is None or record.messages[0].role == "system":
        return record
    return replace(record, messages=(Message("system", (Text(system),)), *record.messages))


def llava_record(raw: Any, source: str, index: int, images: Sequence[Image], position: ImagePosition) -> Record:
    """Make a record of a row with LLaVA's `conversations`.

    Args:
        raw: the row.
        source: name of the row's source.
        index: number of the row, its id where it has none.
        images: the row's images, in the order of their marks.
        position: where images stand in a turn; see `LlavaJson`.

    Raises:
        RecordError: naming the turn or key that is wrong, or the numbers of marks and images that differ.
    """
    turns = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RecordError("malformed", f"entry {index} has no list 'conversations'")
    marks = sum(str(turn.get("value", "")).count(MARK) for turn in turns if isinstance(turn, dict))
    if position == "spaced" and not marks and isinstance(turns[0], dict) and isinstance(turns[0].get("value"), str):
        turns = [turns[0] | {"value": MARK * len(images) + turns[0]["value"]}, *turns[1:]]
        marks = len(images)
    if marks != len(images):
        advice = "; image_position: spaced puts them in front" if images and not marks else ""
        raise RecordError(
            "image_count", f"{marks} {MARK} marks in the text, {len(images)} images in 'image' (or 'images'){advice}"
        )
    remaining = iter(images)
    messages = tuple(_llava_message(turn, i, remaining, position) for i, turn in enumerate(turns))
    advice = "name pictures under 'image', with a mark for each; videos are read by LlavaVideo"
    refuse_unread(raw, IMAGE_KEYS, bool(images), f"entry {index}", advice)
    refuse_calls(raw, f"entry {index}")
    identity = str(index if raw.get("id") is None else raw["id"])
    return refuse_marks(Record(identity, source, messages, urls=urls_of(raw)))


def _llava_message(turn: Any, index: int, remaining: Iterator[Image], position: ImagePosition) -> Message:
    found = turn.get("from") if isinstance(turn, dict) else turn
    if not isinstance(turn, dict) or not isinstance(found, str) or found not in LLAVA_ROLES:
        raise RecordError("unknown_role", f"conversations[{index}].from is {found!r}; known: {', '.join(LLAVA_ROLES)}")
    refuse_unread(turn, (), False, f"conversations[{index}]", "name pictures under 'image' of the sample")
    if not isinstance(turn.get("value"), str):
        raise RecordError("malformed", f"conversations[{index}].value is not a string")
    pieces = turn["value"].split(MARK)
    images = [next(remaining) for _ in pieces[1:]]
    if images and position == "front":
        text = "".join(pieces).strip()
        return Message(LLAVA_ROLES[found], (*images, *([Text(f"\n{text}")] if text else [])))
    if images and position == "spaced":
        first, *inner = (piece.strip() for piece in pieces)
        last = inner.pop()
        pieces = [f"{first} " if first else "", *(f"\n{piece} " for piece in inner), f"\n{last}" if last else ""]
    return Message(LLAVA_ROLES[found], tuple(interleave(pieces, images)))


def interleave(pieces: Sequence[str], images: Sequence[Image]) -> Iterator[Text | Image]:
    """Yield text, image, text, ..., from the pieces of text between marks; empty pieces are left out."""
    for piece, image in zip_longest(pieces, images):
        if piece:
            yield Text(piece)
        if image is not None:
            yield image
