"""The format of a run's samples, kept so that later questions to its model are written in the same way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_vlm.data.records import Message
from lit_vlm.data.records.media import MARK
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.spelling import spelling_of
from lit_vlm.data.sample.templates import ChatML, Llama3, Phi3, Span, Template
from lit_vlm.data.sample.transforms import ImageTransform

log = logging.getLogger(__name__)


def _others(spec: InputSpec) -> str:
    """Templates that go with a tokenizer, as the end of a message."""
    vocab = spec.tokenizer.get_vocab()
    named = [kind.__name__ for kind in (ChatML, Llama3, Phi3) if all(mark in vocab for mark in kind().marks(""))]
    if spec.tokenizer.chat_template:
        named.append("auto, the chat template that comes with the tokenizer")
    return f". With this tokenizer goes --data.template {', or '.join(named)}" if named else ""


@dataclass(frozen=True)
class SampleFormat:
    """What decides the ids and pixels of a record, besides the model.

    Attributes:
        template: how messages are written.
        transform: how pictures are resized.
        max_length: most positions of a sample.
        fast_jpeg: decode a JPEG at a fraction of its size where that leaves enough.
    """

    template: Template
    transform: ImageTransform
    max_length: int
    fast_jpeg: bool

    def template_for(self, spec: InputSpec) -> Template:
        """The template as the model's tokenizer has it; raises as `Template.for_tokenizer`."""
        return self.template.for_tokenizer(spec.tokenizer)

    def check_marks(self, spec: InputSpec, action: Literal["refuse", "warn"]) -> None:
        """Check that the tokenizer has a token for each mark of the template; logs what else is amiss with a template.

        Args:
            spec: of the model; its tokenizer is looked at.
            action: `refuse` where training begins anew, `warn` where training continues or a trained model answers.

        Raises:
            ValueError: naming the template, the marks and the tokenizer, if the action is `refuse`.
        """
        template, name = self.template_for(spec), f"data.template {type(self.template).__name__}"
        marks = template.marks(spec.tokenizer.eos_token or "")
        try:
            spelling_of(spec.tokenizer).check(marks, name, action)
        except ValueError as error:
            raise ValueError(f"{error}{_others(spec)}") from error
        said = spelling_of(spec.tokenizer).checked
        for note in template.notes():
            if note not in said:
                said.add(note)
                log.warning("%s: %s", name, note)

    def closing_id(self, spec: InputSpec) -> int | None:
        """Id of the token that closes an answer in this template; None where no single token does."""
        return spelling_of(spec.tokenizer).single(self.template_for(spec).closing(spec.tokenizer.eos_token or ""))

    def prompt(self, messages: Sequence[Message], spec: InputSpec) -> str:
        """A conversation as text up to the next answer, with `<image>` for each image."""
        return "".join(MARK if text is None else text for text in self.pieces(messages, spec))

    def pieces(self, messages: Sequence[Message], spec: InputSpec) -> list[str | None]:
        """A conversation up to the next answer: its text in pieces, and None where an image stands."""
        pieces = self.template_for(spec).prompt(messages, spec.tokenizer.eos_token or "")
        return [piece.text if isinstance(piece, Span) else None for piece in pieces]

    def sample_encoder(
        self, spec: InputSpec, too_long: Literal["truncate", "drop"] = "drop", prompt: bool = False, extra: int = 0
    ) -> SampleEncoder:
        """The encoder of samples in this format; see `check_marks` for marks that the tokenizer does not know.

        Args:
            spec: what the data side knows of the model.
            too_long: whether a longer sample loses its tail or is dropped.
            prompt: write only up to the next answer.
            extra: positions on top of `max_length`.
        """
        length = self.max_length + extra
        return SampleEncoder(spec, self.template_for(spec), self.transform, length, too_long, prompt, self.fast_jpeg)
