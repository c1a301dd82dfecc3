"""Text of prompts: places of pictures, and what people typed, in which letters of special tokens stay letters."""

from __future__ import annotations

from typing import Any

from lit_vlm.data.records import Image
from lit_vlm.data.sample.chat_template import IMAGE_MARK
from lit_vlm.data.sample.templates import Piece, Span

TYPED = ("\ufdee", "\ufdef")
"""Noncharacters around text that a chat holds, so that the letters of a special token in it stay letters."""
_PLACE = Image(path="picture")


def pieces_of(text: str) -> list[Piece]:
    """Spans and images of a text with `<image>` marks and marks around what people typed."""
    pieces: list[Piece] = []
    for index, part in enumerate(text.split(IMAGE_MARK)):
        if index:
            pieces.append(_PLACE)
        for number, stretch in enumerate(part.split(TYPED[0])):
            typed, closed, rest = stretch.partition(TYPED[1]) if number else ("", "", stretch)
            pieces += [
                Span(one, typed=own)
                for one, own in ((typed, True), (rest if closed or not number else "", False))
                if one
            ]
    return pieces


def typed(conversation: Any) -> Any:
    """A copy of messages, or of conversations, with marks around all their text."""
    if isinstance(conversation, dict):
        content = conversation.get("content")
        if isinstance(content, str):
            content = _wrapped(content)
        elif content is not None:
            content = [
                {**part, "text": _wrapped(part["text"])} if part.get("type") == "text" else part for part in content
            ]
        return {**conversation, "content": content}
    messages = getattr(conversation, "messages", conversation)
    return [typed(one) for one in messages]


def _wrapped(text: str) -> str:
    """Text between marks; `<image>` in it stays a place for a picture."""
    parts = [part.replace(TYPED[0], "").replace(TYPED[1], "") for part in text.split(IMAGE_MARK)]
    return IMAGE_MARK.join(f"{TYPED[0]}{part}{TYPED[1]}" if part else "" for part in parts)
