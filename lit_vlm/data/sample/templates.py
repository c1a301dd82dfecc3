"""Templates: from messages to the text that the decoder reads, with the supervised stretches marked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lit_vlm.data.records import Image, Message, RecordError, Text

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Span:
    """A stretch of text.

    Attributes:
        text: the text itself.
        supervised: whether its tokens carry a loss.
        typed: whether it comes from a record or from `system`, so that the letters of a special token in it stay
            letters.
        mark: whether it is one special token, which the tokenizer must know.
    """

    text: str
    supervised: bool = False
    typed: bool = False
    mark: bool = False


Piece = Span | Image


class Template(ABC):
    """How messages are written for a decoder.

    Args:
        system: system text of records that have none; "" writes none, null takes the template's own.
        image_marks: text in front of each image and behind it, such as `[<img>, </img>]` (InternVL, HoVLE).
        typed_marks: what becomes of the letters of a special token, such as `</s>`, in the text of records and in
            `system`: `text` keeps them letters; `tokens` makes them that token, as the code of LLaVA and VILA does.

    Attributes:
        default_system: the template's own system text.
        own_start: whether conversations begin as the template writes them, without the token that the tokenizer puts in
            front of every text.
    """

    default_system = ""
    own_start = False

    def __init__(
        self,
        system: str | None = None,
        image_marks: tuple[str, str] | None = None,
        typed_marks: Literal["text", "tokens"] = "text",
    ) -> None:
        self.system = self.default_system if system is None else system
        self.image_marks, self.typed_marks = image_marks, typed_marks

    def for_tokenizer(self, tokenizer: Any) -> Template:
        """The template as this tokenizer's texts are written; for most, itself."""
        return self

    def as_jinja(self, image: str) -> str | None:
        """The jinja template that writes the same; None where it has to be found (`as_jinja` of chat_template.py).

        Args:
            image: what stands for a picture.
        """
        return None

    def opening(self) -> str:
        """What a model learns to write in front of an answer's text, which is no part of the answer."""
        return ""

    def notes(self) -> list[str]:
        """What users should know before they train with this template."""
        return []

    def render(self, messages: Sequence[Message], eos: str) -> list[Piece]:
        """The whole conversation, for training; every answer is closed, also a blank one.

        Args:
            messages: the turns.
            eos: text of the tokenizer's end-of-sequence token.

        Raises:
            RecordError: for an order of roles that the template cannot write, or a blank document.
        """
        if any(message.role == "document" for message in messages):
            return list(self._finished(_document(messages, eos)))
        return list(self._finished(self._turns(*self._split(messages), eos)))

    def prompt(self, messages: Sequence[Message], eos: str) -> list[Piece]:
        """The conversation up to where the assistant's next answer begins, for generation.

        If the last message is the assistant's, it is the expected answer and is left out.

        Args:
            messages: the turns.
            eos: text of the tokenizer's end-of-sequence token.

        Raises:
            RecordError: for an order of roles that the template cannot write, or a conversation without a question.
        """
        asked = list(messages)
        if asked and asked[-1].role == "assistant":
            asked = asked[:-1]
        if any(message.role == "document" for message in asked):
            raise RecordError("role_order", "a document stands alone, and nothing can be asked about it")
        system, turns = self._split(asked)
        if not turns:
            raise RecordError("role_order", "there is no question to answer")
        return list(self._finished(self._asked(system, turns, eos)))

    def closing(self, eos: str) -> str:
        """The text that the template writes behind an answer; "" if it writes none.

        Args:
            eos: text of the tokenizer's end-of-sequence token.
        """
        turns = [Message("user", (Text("a"),)), Message("assistant", (Text("a"),))]
        spans = [piece for piece in self._turns([], turns, eos) if isinstance(piece, Span)]
        return "".join([span.text for span in spans if span.supervised and not span.typed][-1:])

    def marks(self, eos: str) -> list[str]:
        """The special tokens that the template writes in a conversation, each once.

        Args:
            eos: text of the tokenizer's end-of-sequence token; "" for a tokenizer without one, which the result then
                holds if the template writes it.
        """
        turns = [Message("user", (Text("a"),)), Message("assistant", (Text("a"),))]
        pieces = self._turns([Span("a", typed=True)], turns, eos)
        return list(dict.fromkeys(piece.text for piece in pieces if isinstance(piece, Span) and piece.mark))

    def _split(self, messages: Sequence[Message]) -> tuple[list[Piece], list[Message]]:
        """Split off the system text, the record's or else the template's; check the order of the other turns."""
        turns = list(messages)
        given = turns.pop(0) if turns and turns[0].role == "system" else Message("system", (Text(self.system),))
        self._check_order(turns)
        return [piece for piece in content_of(given, supervised=False) if piece != _NOTHING], turns

    def _check_order(self, turns: Sequence[Message]) -> None:
        """Check that user and assistant alternate; raises RecordError."""
        for index, message in enumerate(turns):
            if message.role == "tool":
                raise RecordError(
                    "role_order",
                    f"turn {index} is of 'tool', and the template {type(self).__name__} has no such turns: take HFChat",
                )
            if message.role != ("user", "assistant")[index % 2]:
                raise RecordError(
                    "role_order", f"turn {index} is of '{message.role}'; user and assistant must alternate"
                )

    def _finished(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Add `image_marks` around images, and treat typed letters of special tokens as `typed_marks` says."""
        for piece in pieces:
            if isinstance(piece, Span):
                yield replace(piece, typed=False) if piece.typed and self.typed_marks == "tokens" else piece
            elif self.image_marks is None:
                yield piece
            else:
                yield Span(self.image_marks[0])
                yield piece
                yield Span(self.image_marks[1])

    @abstractmethod
    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        """Write the turns; each answer, also a blank one, with the mark that closes it."""

    def _asked(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        """Write turns that end with a question, and the text that opens its answer."""
        yield from self._turns(system, turns, eos)


_NOTHING = Span("", typed=True)


def is_blank(message: Message) -> bool:
    """Whether a message holds neither an image nor text other than white space."""
    return not message.text.strip() and not any(isinstance(part, Image) for part in message.content)


def _document(messages: Sequence[Message], eos: str) -> Iterator[Piece]:
    if len(messages) != 1:
        raise RecordError("role_order", "a document stands alone, without other messages")
    if is_blank(messages[0]):
        raise RecordError("empty_document", "the document holds neither text nor a picture")
    yield from content_of(messages[0], supervised=True)
    closing = messages[0].content[-1:]
    yield Span(eos, not (closing and isinstance(closing[0], Text) and closing[0].loss is False))


def content_of(message: Message, supervised: bool) -> Iterator[Piece]:
    """Yield the pieces of a message's content.

    Args:
        message: the message.
        supervised: whether its text carries a loss; the `loss` of a text decides where it is set.
    """
    for part in message.content:
        if isinstance(part, Image):
            yield part
        else:
            yield Span(part.text, supervised if part.loss is None else part.loss, typed=True)


def closes_with_loss(message: Message) -> bool:
    """Whether the mark that closes an answer is supervised: it is where any of the answer's text is."""
    return any(part.text and part.loss is not False for part in message.content if isinstance(part, Text))


class Plain(Template):
    """The image and its caption, nothing else: alignment of LLaVA-1.5, VILA and EVE. The question is left out.

    Args:
        system: unused by this template.
        end: text that closes the caption; a newline in the published recipes. Null writes the end-of-sequence token
            instead (VILA's earlier code).
        after_image: text between image and caption, without loss; nothing in the published recipes.
        image_marks: see `Template`.
        typed_marks: see `Template`.
    """

    def __init__(
        self,
        system: str | None = None,
        end: str | None = "\n",
        after_image: str = "",
        image_marks: tuple[str, str] | None = None,
        typed_marks: Literal["text", "tokens"] = "text",
    ) -> None:
        super().__init__(system, image_marks, typed_marks)
        self.end, self.after_image = end, after_image

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        if len(turns) != 2:
            raise RecordError("role_order", "template Plain takes one question and one answer")
        yield from self._asked(system, turns[:1], eos)
        yield from content_of(turns[1], supervised=True)
        yield Span(eos if self.end is None else self.end, closes_with_loss(turns[1]), mark=self.end is None)

    def _asked(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        if len(turns) != 1:
            raise RecordError("role_order", "template Plain takes one question and one answer")
        images = [part for part in (*system, *turns[0].content) if isinstance(part, Image)]
        yield from images
        if images and self.after_image:
            yield Span(self.after_image)


class VicunaV1(Template):
    """`SYSTEM USER: question ASSISTANT: answer</s>`: Vicuna-1.1, as LLaVA-1.5, VILA and EVE use it.

    The space before an answer belongs to it: the prompt for generation ends in `ASSISTANT:`.
    """

    default_system = VICUNA_SYSTEM

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from system
        yield Span(" ")
        for message in turns:
            if message.role == "user":
                yield Span("USER: ")
                yield from content_of(message, supervised=False)
                yield Span(" ASSISTANT:")
            else:
                yield Span(" ", _begins_with_loss(message))
                yield from content_of(message, supervised=True)
                yield Span(eos, closes_with_loss(message), mark=True)


def _begins_with_loss(message: Message) -> bool:
    """Whether the first text of an answer is supervised."""
    texts = [part for part in message.content if isinstance(part, Text) and part.text]
    return bool(texts) and texts[0].loss is not False


class _Headed(Template):
    """Templates that open each turn with a header and close it with a mark; the mark of an answer is supervised.

    Attributes:
        header: text that opens a turn, in pieces; `{}` stands for the role. A piece in `<` and `>` is a special token.
        close: the special token that closes a turn.
        after: text that follows the closing token.
    """

    header: tuple[str, ...]
    close: str
    after: str

    def _turns(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        if system:
            yield from self._opening("system")
            yield from system
            yield Span(self.close, mark=True)
            yield Span(self.after)
        for message in turns:
            yield from self._opening(message.role)
            answer = message.role == "assistant"
            yield from content_of(message, supervised=answer)
            yield Span(self.close, answer and closes_with_loss(message), mark=True)
            yield Span(self.after)

    def _asked(self, system: Sequence[Piece], turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from self._turns(system, turns, eos)
        yield from self._opening("assistant")

    def _opening(self, role: str) -> Iterator[Piece]:
        for piece in self.header:
            yield Span(piece.format(role), mark=piece.startswith("<") and piece.endswith(">"))


class ChatML(_Headed):
    r"""`<|im_start|>role\n ... <|im_end|>\n`: Qwen, SmolLM2, InternLM2 and others."""

    header, close, after = ("<|im_start|>", "{}\n"), "<|im_end|>", "\n"


class Llama3(_Headed):
    r"""`<|start_header_id|>role<|end_header_id|>\n\n ... <|eot_id|>`: Llama-3 Instruct."""

    header, close, after = ("<|start_header_id|>", "{}", "<|end_header_id|>", "\n\n"), "<|eot_id|>", ""


class Phi3(_Headed):
    r"""`<|role|>\n ... <|end|>\n`: Phi-3 Instruct."""

    header, close, after = ("<|{}|>", "\n"), "<|end|>", "\n"
