"""Fuyu: the prompt that Fuyu-8B was published with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lit_vlm.data.records import Image, Message
from lit_vlm.data.sample.templates import Piece, Span, Template, closes_with_loss, content_of

START, ANSWER = "<s>", "<0x04>"


class Fuyu(Template):
    r"""`IMAGES<s>question\n<0x04>answer|ENDOFTEXT|`: Fuyu-8B (Adept 2023), as its processor and model card write it.

    The pictures of the first question stand in front of everything, the token that starts a text behind them; `<0x04>`
    begins the answer, and the tokenizer's end-of-sequence token closes it. Published are one picture and one question.
    Ours: several pictures side by side, a system text as a line of its own, and further turns behind the answer.
    """

    own_start = True

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        first = [*system, *(turns[0].content if turns else ())]
        yield from (part for part in first if isinstance(part, Image))
        yield Span(START, mark=True)
        if system:
            yield from (piece for piece in system if isinstance(piece, Span))
            yield Span("\n")
        for index, message in enumerate(turns):
            if message.role == "user":
                yield from self._question(message, pictures=index > 0)
                yield Span("\n")
                yield Span(ANSWER, mark=True)
            else:
                yield from content_of(message, supervised=True)
                yield Span(eos, closes_with_loss(message), mark=True)

    def _question(self, message: Message, pictures: bool) -> Iterator[Piece]:
        """Write a question; the white space that stood between the pictures in front and its text is left out."""
        begun = pictures
        for piece in content_of(message, supervised=False):
            if isinstance(piece, Image):
                if pictures:
                    yield piece
            elif text := piece.text if begun else piece.text.lstrip():
                begun = True
                yield replace(piece, text=text)
