"""The chat template of a tokenizer, with the text that carries a loss found in what it writes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from lit_vlm.data.records import Message, RecordError, Role, Text
from lit_vlm.data.sample.chat_frame import (
    FIRST_PLACE,
    Around,
    Frame,
    content_spans,
    kept_of,
    shown,
    text_of,
    unused_place,
    without_opening,
)
from lit_vlm.data.sample.chat_template import as_value, joining
from lit_vlm.data.sample.templates import Piece, Span, Template

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks the text of the assistant itself."""
MARK_LIKE = re.compile(r"<\|[^\s<>|]+\|>")
FOLLOWS: dict[Role, tuple[Role, ...]] = {
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role of a turn → those of the next."""
NO_DATE = "it writes the day of writing, and the same record would differ from day to day: set init_args.date, such as "
NO_DATE += "'26 July 2024'"


class HFChat(Template):
    """The chat template that comes with the decoder's tokenizer, or a jinja template of your own.

    Text and ids are those of the tokenizer's `apply_chat_template`. A loss is on what `{% generation %}` marks of the
    template hold, or, without such marks, on all that follows the prompt of an answer, through the mark that closes it.
    The prompt of each answer has to be the beginning of the whole conversation. Templates that write an answer
    otherwise once another follows, such as those that leave out its thoughts, take conversations of one answer, or
    `answers: last`.

    Args:
        chat_template: jinja text, such as `"$(cat FILE)"` on a command line; null takes the tokenizer's own.
        arguments: what the template is given besides messages, such as `{enable_thinking: false}` or `tools`. A call of
            a tool is text of an answer, as the model is to write it; what it gave is a turn of role `tool`.
        date: what a template gets that writes the day of writing, such as `26 July 2024`; needed for those.
        answers: `all` answers of a conversation carry a loss, or the `last` one alone; the others are then written as
            the model meets them when it is asked again.
        system: system text of records that have none; null and "" leave it to the template, which may have its own.
        image_marks: see `Template`.
        typed_marks: see `Template`.

    Raises:
        ValueError: for a path in place of a template.
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
        if chat_template is not None and "{" not in chat_template:
            # A file may change or move; a run's config holds the text.
            raise ValueError(
                f"data.template.init_args.chat_template is {chat_template!r}, no jinja: give the text of the template, "
                'such as "$(cat FILE)"'
            )
        self.jinja = chat_template or ""
        self.parts = False
        self.special: dict[str, str] = {}
        self.closers: tuple[str, ...] = ()
        self._known: dict[tuple[tuple[str, ...], bool], Frame] = {}

    def for_tokenizer(self, tokenizer: Any) -> HFChat:
        """A copy that writes what this tokenizer's chat template writes.

        Raises:
            ValueError: for a tokenizer without a chat template, one that writes a turn in a way that loses its answer,
                and one that depends on the day.
        """
        return _bound(self, tokenizer, len(tokenizer), self.jinja or _own_of(tokenizer))

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from self._written([*_system(system), *turns], asked=False)

    def _asked(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from self._written([*_system(system), *turns], asked=True)

    def _check_order(self, turns: Sequence[Message]) -> None:
        """Check that each answer has a question or what tools gave in front of it; raises RecordError."""
        allowed: tuple[Role, ...] = ("user",)
        for index, message in enumerate(turns):
            if message.role not in allowed:
                raise RecordError(
                    "role_order", f"turn {index} is of '{message.role}', and only {' or '.join(allowed)} may come here"
                )
            allowed = FOLLOWS[message.role]

    def notes(self) -> list[str]:
        """Which conversations cannot be written, and what a model learns that its prompts do not have."""
        found = []
        try:
            self._frame(("user", "assistant") * 2, False)
        except RecordError as error:
            found.append(f"conversations of several answers are dropped: {error.detail}")
        frame = self._frame(("user", "assistant"), False)
        prompt = self._frame(("user",), True).literals[-1].text
        between = frame.literals[1].text
        if not between.startswith(prompt):
            found.append(
                f"answers are taught behind {between!r} and asked for behind {prompt!r}: set init_args.arguments, such "
                "as {enable_thinking: false}"
            )
        elif (opening := self.opening()).strip():
            found.append(
                f"answers begin with {opening!r}, which the model learns to write: set init_args.arguments, such as "
                "{enable_thinking: false}, where the prompt is to hold it"
            )
        if not self.closing(""):
            found.append(
                "the chat template closes answers with no mark, so that a model does not learn to end them: generation "
                "stops at the length, or at the end of text"
            )
        return found

    def closing(self, eos: str) -> str:
        """As `Template.closing`: the first special token that the template teaches behind an answer."""
        literal = self._frame(("user", "assistant"), False).literals[-1]
        behind = "".join(text for taught, text in literal.runs() if taught)
        found = [(behind.find(mark), -len(mark), mark) for mark in self.closers if mark in behind]
        return min(found)[2] if found else ""

    def marks(self, eos: str) -> list[str]:
        """As `Template.marks`: what is written like a special token around a question and its answer."""
        texts = [literal.text for literal in self._frame(("user", "assistant"), False).literals]
        return list(dict.fromkeys(MARK_LIKE.findall("".join(texts))))

    def as_jinja(self, image: str) -> str:
        """The chat template with the arguments and the date, for chats whose messages may be lists of parts."""
        settings = "".join(f"{{%- set {name} = {as_value(value)} -%}}" for name, value in self.arguments.items())
        return self._today() + settings + joining(image, self.system, self.parts) + self.jinja

    def opening(self) -> str:
        """What a model learns to write in front of an answer's text, such as an empty thought."""
        between = self._frame(("user", "assistant"), False).literals[1]
        return "".join(text for taught, text in between.runs() if taught)

    def _written(self, messages: Sequence[Message], asked: bool) -> list[Piece]:
        """The pieces of a conversation: what the template writes around contents, and the contents."""
        if not messages:
            return []
        frame = self._frame(tuple(message.role for message in messages), asked)
        if asked:  # as the model wrote them, earlier answers may begin with what the template writes by itself
            messages = [without_opening(message, self.opening()) for message in messages]
        place = unused_place("".join(message.text for message in messages))
        contents = [text_of(message, place) for message in messages]
        text = self._render([(message.role, one) for message, one in zip(messages, contents, strict=True)], asked)
        kept = kept_of(text, contents, frame.literals)
        pieces: list[Piece] = []
        for index, message in enumerate(messages):
            pieces += frame.literals[index].spans(messages[max(index - 1, 0) : index + 1])
            pieces += content_spans(message, kept[index], frame.taught[index])
        return [*pieces, *frame.literals[-1].spans(messages[-1:])]

    def _frame(self, roles: tuple[str, ...], asked: bool) -> Frame:
        """What the template writes around the contents of messages of these roles.

        Raises:
            RecordError: for roles that the template refuses, and for contents or answers that it does not write once
                and in order, or otherwise than it asked for them.
        """
        if (roles, asked) not in self._known:
            self._known[roles, asked] = self._found(roles, asked)
        return self._known[roles, asked]

    def _found(self, roles: tuple[str, ...], asked: bool) -> Frame:
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
        literals = [
            Around(text[before + 1 : after], tuple(supervised[before + 1 : after])) for before, after in pairwise(edges)
        ]
        return Frame(literals, [supervised[place] for place in places])

    def _answers(self, chat: list[tuple[str, str]], text: str) -> list[tuple[int, int]]:
        """The stretches of a written conversation that carry a loss, the place of each answer's content in them."""
        asked = [index for index, (role, _) in enumerate(chat) if role == "assistant"]
        asked = asked[-1:] if self.answers == "last" else asked
        if not asked:
            return []
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
                f"the chat template asks for answer {index} behind {shown(prompt[-40:])} and writes something else in "
                "front of it in the whole conversation: set init_args.arguments, such as {enable_thinking: false}, or "
                "give a template with {% generation %} marks by init_args.chat_template"
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
                f"the chat template writes answer {index} as {shown(closed[len(prompt) :])} at the end, and "
                "otherwise where another question follows: set init_args.answers to last, or give a template with "
                "{% generation %} marks by init_args.chat_template",
            )
        return len(prompt), len(closed)

    def _today(self) -> str:
        """In front of a chat template: what it gets for the day of writing. A newline behind a block is not written."""
        day = as_value(self.date) if self.date else f"raise_exception({as_value(NO_DATE)})"
        day = f"{{{{ {day} }}}}"
        return f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}\n"

    def _render(self, chat: Sequence[tuple[str, str]], asked: bool) -> str:
        return str(self._run(chat, asked, False)[0][0])

    def _run(self, chat: Sequence[tuple[str, str]], asked: bool, marked: bool) -> Any:
        if not self.jinja:
            raise ValueError("data.template HFChat: no tokenizer has given it a chat template yet: call for_tokenizer")
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if self.parts else content}
            for role, content in chat
        ]
        try:
            return render_jinja_template(
                [messages],
                chat_template=self._today() + self.jinja,
                add_generation_prompt=asked,
                return_assistant_tokens_mask=marked,
                **(self.special | self.arguments),
            )
        except Exception as error:  # whatever a template's own code may raise
            raise RecordError("chat_template", f"the chat template refuses it: {error or repr(error)}") from error


@lru_cache(maxsize=4)
def _bound(template: HFChat, tokenizer: Any, size: int, jinja: str) -> HFChat:
    """A template with a tokenizer's chat template and tokens, made once, and anew when tokens were added."""
    bound = copy.copy(template)
    bound._known = {}
    bound.jinja = jinja
    bound.special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    bound.closers = tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))
    try:
        bound._frame(("user", "assistant"), False)
    except RecordError as error:
        bound.parts = True  # templates of multimodal models take contents in parts alone
        try:
            bound._frame(("user", "assistant"), False)
        except RecordError:
            raise ValueError(f"data.template HFChat: {error.detail}") from error
    return bound


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
    content = tuple(
        Text(piece.text, loss=True if piece.supervised else None) if isinstance(piece, Span) else piece
        for piece in pieces
    )
    return [Message("system", content)] if content else []
