"""The chat template of a tokenizer, with the text that carries a loss found in what it writes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lit_vlm.data.records import Image, Message, RecordError, Text
from lit_vlm.data.sample.around import Around, content_spans, kept_of
from lit_vlm.data.sample.templates import Piece, Span, Template

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks the text of the assistant itself."""
FIRST_PLACE = 0xE000
"""The first of the characters, without a meaning in Unicode, that stand for contents and pictures for a while."""
PLACES = range(FIRST_PLACE, FIRST_PLACE + 6400)
TODAY = "{{%- macro strftime_now(format) -%}}{}{{%- endmacro -%}}"
"""In front of a chat template: what it gets for the day of writing."""


class HFChat(Template):
    """The chat template that comes with the decoder's tokenizer, or a jinja template of your own.

    Text and ids are those of the tokenizer's `apply_chat_template`. A loss is on what `{% generation %}` marks of the
    template hold, or, without such marks, on all that follows the prompt of an answer, through the mark that closes it.
    The prompt of each answer has to be the beginning of the whole conversation. Templates that write an answer
    otherwise once another follows, such as those that leave out its thoughts, take conversations of one answer, or
    `answers: last`.

    Args:
        chat_template: jinja text, or the path of a file that ends in `.jinja`; null takes the tokenizer's own.
        arguments: what the template is given besides messages, such as `{enable_thinking: false}` or `tools`.
        date: what a template gets that writes the day of writing, such as `26 July 2024`; needed for those.
        answers: `all` answers of a conversation carry a loss, or the `last` one alone; the others are then written as
            the model meets them when it is asked again.
        system: system text of records that have none; null and "" leave it to the template, which may have its own.
        image_marks: see `Template`.
        typed_marks: see `Template`.

    Raises:
        ValueError: for a file that cannot be read.
    """

    own_start = True

    def __init__(
        self,
        chat_template: str | None = None,
        arguments: dict[str, Any] | None = None,
        date: str | None = None,
        answers: Literal["all", "last"] = "all",
        system: str | None = None,
        image_marks: tuple[str, str] | None = None,
        typed_marks: Literal["text", "tokens"] = "text",
    ) -> None:
        super().__init__(system, image_marks, typed_marks)
        if answers not in ("all", "last"):
            raise ValueError(f"answers is {answers!r}; it is 'all' or 'last'")
        self.chat_template, self.arguments = chat_template, dict(arguments or {})
        self.date, self.answers = date, answers
        self.jinja = _read(chat_template) if chat_template is not None else ""
        self.parts = False
        self.special: dict[str, str] = {}
        self.closers: tuple[str, ...] = ()
        self._known: dict[tuple[tuple[str, ...], bool], list[Around]] = {}

    def for_tokenizer(self, tokenizer: Any) -> HFChat:
        """A copy that writes what this tokenizer's chat template writes.

        Raises:
            ValueError: for a tokenizer without a chat template, one that writes a turn in a way that loses its answer,
                and one that depends on the day.
        """
        bound = copy.copy(self)
        bound._known = {}
        bound.jinja = self.jinja or _own_of(tokenizer)
        bound.special = {
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        bound.closers = tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))
        try:
            bound._literals(("user", "assistant"), False)
        except RecordError as error:
            bound.parts = True  # templates of multimodal models take contents in parts alone
            try:
                bound._literals(("user", "assistant"), False)
            except RecordError:
                raise ValueError(f"data.template HFChat: {error.detail}") from error
        chat = [("user", "a"), ("assistant", "a")]
        if self.date is None and bound._render(chat, False, "1") != bound._render(chat, False, "2"):
            raise ValueError(
                "data.template HFChat: the chat template writes the day of writing, and the same record would differ "
                "from day to day: set init_args.date, such as '26 July 2024'"
            )
        return bound

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from self._written([*_system(system), *turns], asked=False)

    def _asked(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from self._written([*_system(system), *turns], asked=True)

    def notes(self) -> list[str]:
        """That longer conversations cannot be written, or that answers are not closed."""
        found = []
        try:
            self._literals(("user", "assistant") * 2, False)
        except RecordError as error:
            found.append(f"conversations of several answers are dropped: {error.detail}")
        if not self.closing(""):
            found.append(
                "the chat template closes answers with no mark, so that a model does not learn to end them: generation "
                "stops at the length, or at the end of text"
            )
        return found

    def closing(self, eos: str) -> str:
        """As `Template.closing`."""
        behind = self._literals(("user", "assistant"), False)[-1]
        return "".join(text for supervised, text in behind.runs() if supervised)

    def _written(self, messages: Sequence[Message], asked: bool) -> list[Piece]:
        """The pieces of a conversation: what the template writes around contents, and the contents."""
        if not messages:
            return []
        literals = self._literals(tuple(message.role for message in messages), asked)
        place = _unused("".join(message.text for message in messages))
        contents = [_text_of(message, place) for message in messages]
        text = self._render([(message.role, one) for message, one in zip(messages, contents, strict=True)], asked)
        kept = kept_of(text, contents, literals)
        pieces: list[Piece] = []
        for index, message in enumerate(messages):
            pieces += literals[index].spans(messages[max(index - 1, 0) : index + 1])
            teaches = message.role == "assistant" and (self.answers == "all" or index == len(messages) - 1)
            pieces += content_spans(message, kept[index], teaches)
        return [*pieces, *literals[-1].spans(messages[-1:])]

    def _literals(self, roles: tuple[str, ...], asked: bool) -> list[Around]:
        """What the template writes around the contents of messages of these roles.

        Raises:
            RecordError: for roles that the template refuses, and for contents or answers that it does not write once
                and in order, or otherwise than it asked for them.
        """
        if (roles, asked) not in self._known:
            self._known[roles, asked] = self._found(roles, asked)
        return self._known[roles, asked]

    def _found(self, roles: tuple[str, ...], asked: bool) -> list[Around]:
        marks = [chr(FIRST_PLACE + index) for index in range(len(roles))]
        chat = list(zip(roles, marks, strict=True))
        text = self._render(chat, asked)
        places = [text.find(mark) for mark in marks]
        if min(places) < 0 or places != sorted(places) or any(text.count(mark) != 1 for mark in marks):
            raise RecordError(
                "chat_template",
                f"the chat template does not write messages of {', '.join(roles)} once each and in order",
            )
        supervised = [False] * len(text)
        if not asked:
            for start, end in self._answers(chat, text):
                supervised[start:end] = [True] * (end - start)
        edges = [-1, *places, len(text)]
        return [
            Around(text[before + 1 : after], tuple(supervised[before + 1 : after])) for before, after in pairwise(edges)
        ]

    def _answers(self, chat: list[tuple[str, str]], text: str) -> list[tuple[int, int]]:
        """The stretches of a written conversation that carry a loss, the place of each answer's content in them."""
        asked = [index for index, (role, _) in enumerate(chat) if role == "assistant"]
        asked = asked[-1:] if self.answers == "last" else asked
        if not GENERATION.search(self.jinja):
            return [self._stretch(chat, text, index) for index in asked]
        from_here = text.index(chat[asked[0] - 1][1])
        return [(start, end) for start, end in self._run(chat, False, marked=True)[1][0] if end > from_here]

    def _stretch(self, chat: list[tuple[str, str]], text: str, index: int) -> tuple[int, int]:
        """From behind the prompt of an answer through the mark that closes it."""
        prompt, whole = self._render(chat[:index], True), self._render(chat[: index + 1], False)
        if not text.startswith(prompt):
            raise RecordError(
                "chat_template",
                f"the chat template asks for answer {index} behind {prompt[-40:]!r} and writes something else in front "
                "of it in the whole conversation: set init_args.arguments, such as {enable_thinking: false}, or give a "
                "template with {% generation %} marks by init_args.chat_template"
                + (
                    ""
                    if self.answers == "last"
                    else "; or let the last answer alone carry a loss, init_args.answers last"
                ),
            )
        behind = whole.index(chat[index][1]) + 1
        ends = [found + len(mark) for mark in self.closers if (found := whole.find(mark, behind)) >= 0]
        closed = whole[: min(ends, default=behind)]
        if not text.startswith(closed):
            raise RecordError(
                "chat_template",
                f"the chat template writes answer {index} as {closed[len(prompt) :]!r} at the end, and "
                "otherwise where another question follows: set init_args.answers to last, or give a template with "
                "{% generation %} marks by init_args.chat_template",
            )
        return len(prompt), len(closed)

    def _render(self, chat: Sequence[tuple[str, str]], asked: bool, date: str | None = None) -> str:
        return str(self._run(chat, asked, False, date)[0][0])

    def _run(self, chat: Sequence[tuple[str, str]], asked: bool, marked: bool, date: str | None = None) -> Any:
        if not self.jinja:
            raise ValueError("data.template HFChat: no tokenizer has given it a chat template yet: call for_tokenizer")
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if self.parts else content}
            for role, content in chat
        ]
        jinja = TODAY.format(date or self.date or "") + self.jinja
        try:
            return render_jinja_template(
                [messages], chat_template=jinja, add_generation_prompt=asked, return_assistant_tokens_mask=marked,
                **(self.special | self.arguments),
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RecordError("chat_template", f"the chat template refuses it: {error}") from error


def _read(given: str) -> str:
    if not given.endswith(".jinja"):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"data.template.init_args.chat_template {given} cannot be read: {error.strerror}") from error


def _own_of(tokenizer: Any) -> str:
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        own = own.get("default")
    if not own:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"data.template HFChat: the tokenizer {name} has no chat template, as of a base model: give one by "
            "init_args.chat_template, or take a template of the kit, such as VicunaV1"
        )
    return str(own)


def _system(pieces: Sequence[Piece]) -> list[Message]:
    """The system message of these pieces, as a conversation's first; none for nothing."""
    content = tuple(Text(piece.text) if isinstance(piece, Span) else piece for piece in pieces)
    return [Message("system", content)] if content else []


def _unused(text: str) -> str:
    """A character that stands for a picture, which the text does not hold."""
    return next(chr(code) for code in PLACES if chr(code) not in text)


def _text_of(message: Message, place: str) -> str:
    return "".join(place if isinstance(part, Image) else part.text for part in message.content)
