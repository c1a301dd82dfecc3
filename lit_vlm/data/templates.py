"""Templates: from messages to the text that the decoder reads, with the supervised stretches marked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_vlm.data.records import Image, Message, RecordError, Text

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Span:
    """A stretch of text and whether it is supervised."""

    text: str
    supervised: bool = False


Piece = Span | Image


class Template(ABC):
    """How messages are written for a decoder.

    Args:
        system: system text where a record has none; "" writes none, null takes the template's own.
        image_marks: text in front of each image and behind it, such as `[<img>, </img>]` (InternVL, HoVLE).
    """

    default_system = ""

    def __init__(self, system: str | None = None, image_marks: tuple[str, str] | None = None) -> None:
        self.system = self.default_system if system is None else system
        self.image_marks = image_marks

    def render(self, messages: Sequence[Message], eos: str) -> list[Piece]:
        """The whole conversation, for training.

        Args:
            messages: the turns.
            eos: text of the tokenizer's end-of-sequence token.

        Raises:
            RecordError: for an order of roles that the template cannot write.
        """
        if any(message.role == "document" for message in messages):
            return list(self._marked(_document(messages, eos)))
        system, turns = _split_system(messages)
        return list(self._marked(self._turns(self.system if system is None else system, turns, eos)))

    def _marked(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self.image_marks is None or isinstance(piece, Span):
                yield piece
            else:
                yield Span(self.image_marks[0])
                yield piece
                yield Span(self.image_marks[1])

    def prompt(self, messages: Sequence[Message], eos: str) -> list[Piece]:
        """The conversation up to where the assistant's next answer begins, for generation.

        A last message of the assistant is the expected answer, and is left out.
        """
        asked = list(messages)
        if asked and asked[-1].role == "assistant":
            asked = asked[:-1]
        return self.render([*asked, Message("assistant", ())], eos)

    @abstractmethod
    def _turns(self, system: str, turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        """Write the turns. An assistant's message without content opens the answer and leaves it open."""


def _split_system(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """The system text, if there is any, and turns that must alternate user, assistant, user, ..."""
    turns = list(messages)
    system = turns.pop(0).text if turns and turns[0].role == "system" else None
    for index, message in enumerate(turns):
        if message.role != ("user", "assistant")[index % 2]:
            raise RecordError("role_order", f"turn {index} is of '{message.role}'; user and assistant must alternate")
    return system, turns


def _document(messages: Sequence[Message], eos: str) -> Iterator[Piece]:
    if len(messages) != 1:
        raise RecordError("role_order", "a document stands alone, without other messages")
    yield from _content(messages[0], supervised=True)
    closing = messages[0].content[-1:]
    yield Span(eos, not (closing and isinstance(closing[0], Text) and closing[0].loss is False))


def _content(message: Message, supervised: bool) -> Iterator[Piece]:
    for part in message.content:
        if isinstance(part, Image):
            yield part
        else:
            yield Span(part.text, supervised if part.loss is None else part.loss)


class Plain(Template):
    """The image and its caption, nothing else: alignment of LLaVA-1.5, VILA and EVE. The question is left out.

    Args:
        system: unused by this template.
        end: what closes the caption; a newline in the published recipes, and no end-of-sequence token. Null writes that
            token (VILA's earlier code).
        after_image: what stands between image and caption, without loss; nothing in the published recipes.
        image_marks: see `Template`.
    """

    def __init__(
        self,
        system: str | None = None,
        end: str | None = "\n",
        after_image: str = "",
        image_marks: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(system, image_marks)
        self.end, self.after_image = end, after_image

    def _turns(self, system: str, turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        if [turn.role for turn in turns] != ["user", "assistant"]:
            raise RecordError("role_order", "template Plain takes one question and one answer")
        images = [part for part in turns[0].content if isinstance(part, Image)]
        yield from images
        if images and self.after_image:
            yield Span(self.after_image)
        if turns[1].content:
            yield from _content(turns[1], supervised=True)
            yield Span(eos if self.end is None else self.end, True)


class VicunaV1(Template):
    """`SYSTEM USER: question ASSISTANT: answer</s>`: Vicuna-1.1, as LLaVA-1.5, VILA and EVE use it.

    The space before an answer belongs to it: the prompt for generation ends in `ASSISTANT:`.
    """

    default_system = VICUNA_SYSTEM

    def _turns(self, system: str, turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield Span(f"{system} ")
        for message in turns:
            if message.role == "user":
                yield Span("USER: ")
                yield from _content(message, supervised=False)
                yield Span(" ASSISTANT:")
            else:
                if message.content:
                    loss = _loss_of(message)
                    yield Span(" ", loss)
                    yield from _content(message, supervised=True)
                    yield Span(eos, loss)


def _loss_of(message: Message) -> bool:
    """Whether the marks around an answer are supervised: unless all of its text is not."""
    return any(part.loss is not False for part in message.content if isinstance(part, Text))


class _Headed(Template):
    """Templates that open each turn with a header and close it with a mark; the mark of an answer is supervised."""

    header: str
    close: str
    after: str

    def _turns(self, system: str, turns: Sequence[Message], eos: str) -> Iterator[Piece]:
        if system:
            yield Span(self.header.format("system") + system + self.close + self.after)
        for message in turns:
            yield Span(self.header.format(message.role))
            answer = message.role == "assistant"
            if message.content or not answer:
                yield from _content(message, supervised=answer)
                yield Span(self.close, answer and _loss_of(message))
                yield Span(self.after)


class ChatML(_Headed):
    r"""`<|im_start|>role\n ... <|im_end|>\n`: Qwen, SmolLM2, InternLM2 and others."""

    header, close, after = "<|im_start|>{}\n", "<|im_end|>", "\n"


class Llama3(_Headed):
    r"""`<|start_header_id|>role<|end_header_id|>\n\n ... <|eot_id|>`: Llama-3 Instruct."""

    header, close, after = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""


class Phi3(_Headed):
    r"""`<|role|>\n ... <|end|>\n`: Phi-3 Instruct."""

    header, close, after = "<|{}|>\n", "<|end|>", "\n"
