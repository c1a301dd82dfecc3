"""What a caption must be to be kept: an end, a length, and words that do not go round in circles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lit_vlm.data.records import RecordError

LETTERS = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
"""Letters of Chinese and Japanese, which are written without spaces: each counts as a word."""
WORD = re.compile(rf"{LETTERS}|(?:(?!{LETTERS})\w)+")
GRAM = 4
"""Words of the runs whose repetition is counted."""
LONGEST_LOOP = 8
"""Words of the longest phrase that is looked for several times in a row."""
TIMES = 4
"""How often a phrase must follow itself to be a loop."""
SHOWN = 200
"""Letters of a refused caption that are told."""


@dataclass(frozen=True)
class Checks:
    """What makes a caption unusable.

    Attributes:
        min_words: fewest words.
        max_words: most words; None: only the number of tokens is limited.
        max_repeated: largest share of its runs of four words that stand in it before: seq-rep-4 of Welleck et al.
            (arXiv 1908.04319, section 6.1).
        refuse: regular expressions that no part of it may match, in capital or small letters.

    Raises:
        ValueError: for numbers that leave no caption, or an expression that is none.
    """

    min_words: int = 3
    max_words: int | None = None
    max_repeated: float = 0.3
    refuse: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_words < 1:
            raise ValueError(f"--min-words must be at least 1, not {self.min_words}")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"--max-words {self.max_words} is below --min-words {self.min_words}")
        if not 0 <= self.max_repeated <= 1:
            raise ValueError(f"--max-repeated is a share from 0 to 1, not {self.max_repeated}")
        for pattern in self.refuse:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"--refuse {pattern}: is no regular expression: {error}") from error

    def check(self, text: str, cut: bool) -> None:
        """Refuse a caption that fails.

        Args:
            text: the caption.
            cut: whether it was cut at the largest number of tokens.

        Raises:
            RecordError: `empty_caption`, `repeated_caption`, `cut_caption`, `short_caption`, `long_caption` or
                `refused_caption`: the first of these that it is, with the beginning of its text.
        """
        words = WORD.findall(text.lower())
        if not words:
            raise RecordError("empty_caption", f"the model wrote {_shown(text)}")
        if why := self._repeats(words):
            raise RecordError("repeated_caption", f"{why}: {_shown(text)}")
        if cut:
            raise RecordError("cut_caption", f"--max-tokens ended it: {_shown(text)}")
        if len(words) < self.min_words:
            raise RecordError("short_caption", f"{len(words)} words, --min-words {self.min_words}: {_shown(text)}")
        if self.max_words is not None and len(words) > self.max_words:
            raise RecordError("long_caption", f"{len(words)} words, --max-words {self.max_words}: {_shown(text)}")
        for pattern in self.refuse:
            if re.search(pattern, text, re.IGNORECASE):
                raise RecordError("refused_caption", f"--refuse {pattern}: {_shown(text)}")

    def _repeats(self, words: Sequence[str]) -> str:
        """How the words go round in circles; "" if they do not."""
        if phrase := looped(words):
            return f"'{' '.join(phrase)}' {TIMES} times in a row"
        share = repeated(words)
        return f"{share:.0%} of its runs of {GRAM} words are repeated" if share > self.max_repeated else ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def repeated(words: Sequence[str]) -> float:
    """Share of the runs of four words that stand in the text before; 0 for a text with none."""
    grams = list(zip(*(words[start:] for start in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def looped(words: Sequence[str]) -> Sequence[str]:
    """The first phrase, of at most eight words, that stands four times in a row; none: empty."""
    for size in range(1, LONGEST_LOOP + 1):
        alike = 0
        for end, (before, after) in enumerate(zip(words, words[size:], strict=False), size + 1):
            alike = alike + 1 if before == after else 0
            if alike == size * (TIMES - 1):
                return words[end - size : end]
    return ()
