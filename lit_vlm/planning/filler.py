"""What made-up records are filled with: texts of given numbers of tokens, and pictures of given sizes."""

from __future__ import annotations

import io
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage

from lit_vlm.core.batch import IGNORE, Grid, PixelSpec
from lit_vlm.data import Template
from lit_vlm.data.records import Content, Image, Message, RecordError, Text
from lit_vlm.data.sample.pieces import encode_pieces
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.spelling import spelling_of
from lit_vlm.planning.statistics import Group

PROBE = 40
"""Tokens of each text of the records that the template's own tokens are counted with."""
WORD = " the"
ROUND = 256
"""Tokens from which on a conversation has another round."""
MOST_ROUNDS = 8


class Writer:
    """Texts of given numbers of tokens.

    Args:
        tokenizer: counts the tokens.
        template: what is written around texts.
    """

    def __init__(self, tokenizer: Any, template: Template | None) -> None:
        self.tokenizer = tokenizer
        self.template = template.for_tokenizer(tokenizer) if template is not None else None
        short, long = (len(spelling_of(tokenizer).write(WORD * words).ids) for words in (PROBE, 2 * PROBE))
        self.per_word = max(1.0, (long - short) / PROBE)
        self._own: dict[tuple[str, int, int], _Overhead] = {}

    def sequence(self, group: Group, tokens: int, images: list[Image]) -> list[Message]:
        """The messages of a sequence with this many text tokens, as far as the template's own do not exceed them.

        A long conversation has several rounds, so that one that is cut still holds answers.
        """
        rounds = 1 + min(tokens // ROUND, MOST_ROUNDS - 1) if group.form == "conversation" and self._takes_rounds else 1
        key = (group.form, len(images), rounds)
        if key not in self._own:
            self._own[key] = self._overhead(group, images, rounds)
        own = self._own[key]
        free = max(rounds, tokens - own.tokens)
        taught = min(free, max(rounds, round(tokens * group.supervised) - own.supervised))
        if not own.asks:
            taught = free
        return self._messages(group, images, free - taught, taught, rounds)

    @cached_property
    def _takes_rounds(self) -> bool:
        """Whether the template writes more than one question and answer."""
        turns = [Message("user", (Text("a"),)), Message("assistant", (Text("a"),))]
        try:
            if self.template is not None:
                self.template.render(turns * 2, "")
        except RecordError:
            return False
        return True

    def _messages(self, group: Group, images: list[Image], asked: int, taught: int, rounds: int) -> list[Message]:
        if group.form == "document":
            rest = [Text(self.text(asked), loss=False)] if asked else []
            return [Message("document", (*images, Text(self.text(taught)), *rest))]
        # A system text of its own, without letters, takes the place of the template's.
        messages = [Message("system", (Text(""),))]
        for number in range(rounds):
            shown: tuple[Content, ...] = (*images, Text("\n")) if images and not number else ()
            question, answer = (self.text(_part(total, number, rounds)) for total in (asked, taught))
            messages += [
                Message("user", (*shown, Text(question or "?"))),
                Message("assistant", (Text(answer),)),
            ]
        return messages

    def text(self, tokens: int) -> str:
        """A text of about this many tokens; of exactly as many where a word is a whole number of tokens."""
        words = int(tokens / self.per_word)
        return WORD * words + "e" * round(tokens - words * self.per_word)

    def _overhead(self, group: Group, images: list[Image], rounds: int) -> _Overhead:
        """What the template adds, counted on two records of a few tokens."""
        if self.template is None:
            return _Overhead(0, 0, True)
        few = PROBE * rounds
        first, taught = self._count(group, images, few, rounds)
        second, _ = self._count(group, images, 2 * few, rounds)
        asks = second > first
        return _Overhead(first - few * (1 + asks), max(0, taught - few), asks)

    def _count(self, group: Group, images: list[Image], asked: int, rounds: int) -> tuple[int, int]:
        """Text tokens of a sequence with `PROBE` tokens in each answer, and those with a loss."""
        assert self.template is not None
        spec = InputSpec(self.tokenizer, PixelSpec(1, 1, (0.5, 0.5, 0.5)), Grid, _same)
        messages = self._messages(group, images, asked, PROBE * rounds, rounds)
        pieces = self.template.render(messages, self.tokenizer.eos_token or "")
        ids, labels = encode_pieces(pieces, spec, not self.template.own_start)
        return len(ids) - len(images), sum(label != IGNORE for label in labels[1:])


def _part(total: int, number: int, parts: int) -> int:
    """How many of `total` things the part of this number has."""
    return total // parts + (number < total % parts)


class _Overhead(NamedTuple):
    """What a template adds to a sequence.

    Attributes:
        tokens: its own tokens.
        supervised: those of them that carry a loss.
        asks: whether it writes the part of the text without a loss.
    """

    tokens: int
    supervised: int
    asks: bool


def _same(grid: Grid) -> Grid:
    return grid


@lru_cache(maxsize=64)
def jpeg(width: int, height: int, variant: int) -> bytes:
    """A JPEG file of smooth noise with some grain: about half a byte per pixel, as a photograph has."""
    generator = np.random.default_rng((width, height, variant))
    coarse = generator.integers(0, 256, (max(2, height // 24), max(2, width // 24), 3), dtype=np.uint8)
    smooth = np.asarray(PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC), np.int16)
    grain = generator.integers(-20, 21, (height, width, 1), dtype=np.int16)
    picture = PILImage.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=92)
    return file.getvalue()
