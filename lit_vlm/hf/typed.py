"""Text of prompts: places of pictures, and what people typed, in which letters of special tokens stay letters."""

from __future__ import annotations

from typing import Any

from lit_vlm.data.records import Image
from lit_vlm.data.sample.chat_template import IMAGE_MARK
from lit_vlm.data.sample.templates import Piece, Span

TYPED = ("\ufdee", "\ufdef")
"""Noncharacters around text that a chat holds, so that the letters of a special token in it stay letters."""
_BROKEN = IMAGE_MARK[0] + "\ufded" + IMAGE_MARK[1:]
"""The letters of `<image>` in a text whose pictures have places of their own."""
_PLACE = Image(path="picture")


def pieces_of(text: str) -> list[Piece]:
    """Spans and images of a text with `<image>` marks and marks around what people typed."""
    pieces: list[Piece] = []
    for index, part in enumerate(text.split(IMAGE_MARK)):
        if index:
            pieces.append(_PLACE)
        for number, stretch in enumerate(part.split(TYPED[0])):
            typed, closed, rest = stretch.partition(TYPED[1]) if number else ("", "", stretch)
            typed = typed.replace(_BROKEN, IMAGE_MARK)
            pieces += [
                Span(one, typed=own)
                for one, own in ((typed, True), (rest if closed or not number else "", False))
                if one
            ]
    return pieces


def typed(conversation: Any) -> Any:
    """A copy of messages, or of conversations, with marks around all their text.

    In text that stands for itself, `<image>` is a place for a picture; in a part of a list, letters like others.
    """
    if isinstance(conversation, dict):
        content = conversation.get("content")
        if isinstance(content, str):
            content = IMAGE_MARK.join(_wrapped(part) for part in content.split(IMAGE_MARK))
        elif isinstance(content, list | tuple):
            content = [_typed_part(part) for part in content]
        return {**conversation, "content": content}
    messages = getattr(conversation, "messages", conversation)
    return [typed(one) for one in messages]


def _typed_part(part: Any) -> Any:
    """A part of a message, with marks around its text.

    Raises:
        ValueError: for a part that is no mapping with a type, or a text that is none.
    """
    if not isinstance(part, dict) or "type" not in part or not isinstance(part.get("text", ""), str):
        raise ValueError(
            "the content of a message is text, or a list of parts such as {'type': 'text', 'text': ...}; found "
            f"{part!r}"[:300]
        )
    if part["type"] != "text":
        return part
    if "text" not in part:
        raise ValueError(f"a part of a message says that it is text and has none: {part!r}"[:300])
    return {**part, "text": _wrapped(part["text"].replace(IMAGE_MARK, _BROKEN))}


def _wrapped(text: str) -> str:
    plain = text.replace(TYPED[0], "").replace(TYPED[1], "")
    return f"{TYPED[0]}{plain}{TYPED[1]}" if plain else ""
