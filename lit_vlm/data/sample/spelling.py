"""Spelling: the ids of a text, the characters that each id covers, and the letters that are read as a special token."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Tokenizer

log = logging.getLogger(__name__)

NAMES = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Noncharacters, which Unicode keeps for a program's own use, so that no text holds them; `write_letters` uses them."""


class Spelled(NamedTuple):
    """A text as a tokenizer writes it.

    Attributes:
        ids: token ids.
        offsets: (start, end) of the characters that each token covers; several tokens may share a character.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class Spelling:
    """How a fast tokenizer writes text, with what labels need besides ids.

    The tokenizer's post-processor is left out: without special tokens at the ends, it would only remove the spaces in
    front of a word from the characters that the word's token covers, and a token of spaces alone would cover nothing.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Attributes:
        marks: id of a special token → its letters.
        checked: marks that `check` has looked up.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._name: str = tokenizer.name_or_path
        self._added: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        named = set(tokenizer.all_special_tokens)
        self.marks = {i: token.content for i, token in self._added.items() if token.special or token.content in named}
        self._strips = frozenset(i for i, token in self._added.items() if token.lstrip or token.rstrip)
        self._plain = _Writer(_same_model(self._backend, self._added), {t.content: i for i, t in self._added.items()})
        self._single: dict[str, int | None] = {}
        self.checked: set[str] = set()

    def write(self, text: str) -> Spelled:
        """The ids that the tokenizer gives without special tokens at the ends, and the characters that each covers."""
        return self._spelled(text, *self._plain.write(text))

    def _spelled(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Spelled:
        if not self._strips.isdisjoint(ids):
            # A mark that swallows the spaces beside it covers its own letters only.
            offsets = [_stripped(text, *o) if i in self._strips else o for i, o in zip(ids, offsets, strict=True)]
        return Spelled(ids, offsets)

    def marks_in(self, text: str, spelled: Spelled) -> list[int]:
        """Index into `spelled` of each special token whose letters stand in the text."""
        found = [index for index, token in enumerate(spelled.ids) if token in self.marks]
        return [index for index in found if self._is_mark(spelled.ids[index], text[slice(*spelled.offsets[index])])]

    def _is_mark(self, token: int, letters: str) -> bool:
        """Whether the text holds the letters of a special token; if not, the token stands for unknown characters."""
        if letters == self.marks[token] or self._backend.normalizer is None or not self._added[token].normalized:
            return letters == self.marks[token]
        normal = self._backend.normalizer.normalize_str
        return normal(letters) == normal(self.marks[token])

    def write_letters(self, text: str, spelled: Spelled, kept: Collection[int]) -> Spelled:
        """Write a text anew with only some of its special tokens; the letters of the others become ordinary tokens.

        Args:
            text: the text.
            spelled: result of `write` for the text.
            kept: index into `spelled` of each special token that stays one.
        """
        # Marks that stay are written in private letters, for a twin of the tokenizer that knows them by these alone.
        pieces: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        done = 0
        for index in [*sorted(kept), None]:
            start, end = (len(text), len(text)) if index is None else spelled.offsets[index]
            pieces.append(text[done:start])
            starts += range(done, start)
            ends += range(done + 1, start + 1)
            if index is not None:
                pieces.append(self._private_names[spelled.ids[index]])
                starts += [start] * len(pieces[-1])
                ends += [end] * len(pieces[-1])
            done = end
        starts.append(len(text))
        ids, offsets = self._letters.write("".join(pieces))
        return self._spelled(text, ids, [(starts[s], ends[e - 1] if s < e else starts[s]) for s, e in offsets])

    def single(self, text: str) -> int | None:
        """The id of a text that is one token wherever it stands, or None."""
        if text not in self._single:
            before, both = self._plain.write("a")[0], self._plain.write(f"a{text}")[0]
            self._single[text] = both[-1] if both[:-1] == before else None
        return self._single[text]

    def check(self, marks: Sequence[str], template: str, action: Literal["refuse", "warn"]) -> None:
        """Check that each mark is a single token of the tokenizer; warns once for each mark.

        Args:
            marks: texts that a template writes as one token each; "" stands for an end-of-sequence token that the
                tokenizer does not have.
            template: name of the template, for the message.
            action: for a mark that is no single token: `refuse` raises, for training that begins anew; `warn` logs a
                warning, for a trained model, which saw the mark in letters and whose vocabulary cannot grow any more.

        Raises:
            ValueError: naming the template, the marks and the tokenizer, if the action is `refuse`.
        """
        new = [mark for mark in marks if mark not in self.checked]
        self.checked.update(new)
        unknown = [mark for mark in (marks if action == "refuse" else new) if self.single(mark) is None]
        if not unknown:
            return
        if "" in unknown:
            found = (
                f"{template} closes answers with the end-of-sequence token, and the decoder's tokenizer "
                f"({self._name}) has none"
            )
            advice = "set eos_token in its tokenizer_config.json, or take a template that has a mark of its own"
        else:
            found = (
                f"{template} writes {', '.join(unknown)} as one token each, and the decoder's tokenizer "
                f"({self._name}) knows no such token: it is spelled in letters, and no answer ends where generation "
                "stops"
            )
            advice = (
                "take the template that the decoder was trained with, or give it new tokens, which must then be "
                f"trained: --model.decoder.init_args.new_tokens '{json.dumps(unknown)}'"
            )
        if action == "refuse":
            raise ValueError(f"{found}: {advice}")
        log.warning("%s. A checkpoint that was trained so is used as it is; start no other run like it", found)

    @cached_property
    def _private_names(self) -> dict[int, str]:
        """Id of a special token → a name of noncharacters, which no text holds; no name is the start of another."""
        first, *digits = NAMES
        names = {}
        for number, token in enumerate(self.marks):
            name = ""
            while number or not name:
                number, digit = divmod(number, len(digits))
                name += digits[digit]
            names[token] = f"{first}{name}{first}"
        return names

    @cached_property
    def _letters(self) -> _Writer:
        """A writer that knows special tokens by their private names only."""
        ids = {self._private_names.get(i, token.content): i for i, token in self._added.items()}
        return _Writer(_renamed(self._backend, {self.marks[i]: name for i, name in self._private_names.items()}), ids)


class _Writer:
    """A copy of a tokenizer that gives the ids of the original.

    Args:
        tokenizer: the copy.
        ids: letters of an added token in the copy → its id in the original.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.get_added_tokens_decoder()
        self._other = {i: ids[token.content] for i, token in own.items() if ids[token.content] != i}

    def write(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = found.ids
        return [self._other.get(i, i) for i in ids] if self._other else ids, found.offsets


def _same_model(backend: Tokenizer, added: Mapping[int, AddedToken]) -> Tokenizer:
    """A copy of a tokenizer without post-processor that shares the model, and so its memory."""
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    for special, tokens in groupby((added[i] for i in sorted(added)), lambda token: token.special):
        (twin.add_special_tokens if special else twin.add_tokens)(list(tokens))
    return twin


def _renamed(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A copy in which some added tokens have other letters, also in the model's vocabulary, which may hold them.

    Args:
        backend: the tokenizer.
        names: letters of an added token → its letters in the copy.
    """
    described = json.loads(backend.to_str())
    described |= {"post_processor": None, "truncation": None, "padding": None}
    for token in described["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [(a, b) for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(described))


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """Start and end of the characters `start` to `end` of a text without white space at their ends."""
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


@lru_cache(maxsize=4)
def _spelling(tokenizer: Any, size: int) -> Spelling:
    return Spelling(tokenizer)


def spelling_of(tokenizer: Any) -> Spelling:
    """The spelling of a tokenizer, made once for each tokenizer, and anew when tokens were added to it."""
    return _spelling(tokenizer, len(tokenizer))
