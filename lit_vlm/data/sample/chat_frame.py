"""A conversation as a chat template writes it: its own text around contents, and what each content became."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from lit_vlm.data.records import Image, Message, RecordError, Text
from lit_vlm.data.sample.templates import Piece, Span, closes_with_loss

FIRST_PLACE = 0xE000
"""The first of the characters, without a meaning in Unicode, that stand for contents and pictures for a while."""
PLACES = range(FIRST_PLACE, FIRST_PLACE + 6400)


@dataclass(frozen=True)
class Around:
    """Text that the template writes before, between or behind contents.

    Attributes:
        text: the text.
        supervised: for each character, whether it carries a loss.
    """

    text: str
    supervised: tuple[bool, ...]

    def runs(self) -> Iterator[tuple[bool, str]]:
        """The text in pieces, cut where the loss begins and ends, each with whether it carries one."""
        for supervised, group in groupby(zip(self.supervised, self.text, strict=True), lambda pair: pair[0]):
            yield supervised, "".join(letter for _, letter in group)

    def spans(self, beside: Sequence[Message]) -> list[Piece]:
        """The text as pieces of a sample; it has no loss beside an answer whose text has none."""
        taught = all(closes_with_loss(message) for message in beside if message.role == "assistant")
        return [Span(text, supervised and taught) for supervised, text in self.runs()]


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around the contents of a conversation.

    Attributes:
        literals: the text in front of each content, and behind the last.
        taught: for each content, whether it carries a loss.
    """

    literals: list[Around]
    taught: list[bool]


def kept_of(text: str, contents: Sequence[str], literals: Sequence[Around]) -> list[tuple[int, int]]:
    """The range of each content that a written conversation holds: a template may strip white space.

    Raises:
        RecordError: where anything else has changed.
    """
    kept = []
    at = len(literals[0].text)
    if not text.startswith(literals[0].text):
        raise _rewritten(0)
    for index, content in enumerate(contents):
        left, right = len(content) - len(content.lstrip()), len(content.rstrip())
        behind = literals[index + 1].text
        last = index == len(contents) - 1
        for start, end in ((0, len(content)), (min(left, right), right), (left, len(content)), (0, right)):
            part = content[start:end] + behind
            if text.startswith(part, at) and (not last or at + len(part) == len(text)):
                kept.append((start, end))
                at += len(part)
                break
        else:
            raise _rewritten(index)
    return kept


def _rewritten(index: int) -> RecordError:
    return RecordError("chat_template", f"the chat template rewrites the text of messages[{index}]")


def content_spans(message: Message, kept: tuple[int, int], supervised: bool) -> list[Piece]:
    """The pieces of a message's content that the range holds; an image is one character of it."""
    pieces: list[Piece] = []
    at = 0
    for part in message.content:
        if isinstance(part, Image):
            pieces.append(part)
            at += 1
            continue
        text = part.text[max(0, kept[0] - at) : max(0, kept[1] - at)]
        if text:
            pieces.append(Span(text, supervised if part.loss is None else part.loss, typed=True))
        at += len(part.text)
    return pieces


def unused_place(text: str) -> str:
    """A character that stands for a picture, which the text does not hold."""
    return next(chr(code) for code in PLACES if chr(code) not in text)


def text_of(message: Message, place: str) -> str:
    """A message's content as one text, with a character for each picture."""
    return "".join(place if isinstance(part, Image) else part.text for part in message.content)


def shown(text: str) -> str:
    """A piece of a written conversation for a message, with … for contents."""
    return repr("".join("…" if ord(letter) in PLACES else letter for letter in text))


def without_opening(message: Message, opening: str) -> Message:
    """An answer without the text that a template writes in front of it by itself."""
    first = message.content[0] if message.content else None
    if message.role != "assistant" or not opening or not isinstance(first, Text) or not first.text.startswith(opening):
        return message
    return replace(message, content=(replace(first, text=first.text.removeprefix(opening)), *message.content[1:]))
