"""What writes captions: a protocol, and the runs of the kit behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lit_vlm.core.sampling import Sampling
from lit_vlm.data.records import Record
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.evaluation.asker import Asker


class Answer(NamedTuple):
    """What a model wrote.

    Attributes:
        text: without special tokens and spaces around it.
        cut: whether it ended for want of tokens.
    """

    text: str
    cut: bool


class Inputs(Protocol):
    """Makes what a model reads, in a loader process; it pickles, and holds no weights."""

    def one(self, question: Record) -> Any:
        """A question as the model takes it.

        Args:
            question: one turn of the user: the bytes of a picture, and the prompt on a line of its own.

        Raises:
            RecordError: with the reason why it cannot be asked.
        """
        ...

    def join(self, questions: Sequence[Any]) -> Any:
        """A batch of what `one` made; at least one."""
        ...


class Captioner(Protocol):
    """A model in eval mode on its device."""

    @property
    def inputs(self) -> Inputs:
        """Make what it reads."""
        ...

    def write(self, batch: Any, sampling: Sequence[Sampling]) -> list[Answer]:
        """Answer each question of a batch.

        Args:
            batch: as `inputs.join` made it.
            sampling: how each of its questions is answered; those of one batch differ in nothing but their seeds.
        """
        ...


@dataclass(frozen=True)
class RunInputs:
    """Questions in the format of a run.

    Attributes:
        encode: the run's encoder of prompts.
    """

    encode: SampleEncoder

    def one(self, question: Record) -> Sample:
        """As `SampleEncoder`; raises what that does."""
        return self.encode(question, Path("/"))

    def join(self, questions: Sequence[Sample]) -> list[Sample]:
        """The samples, which become a batch on the model's device."""
        return list(questions)


class RunCaptioner:
    """A run of the kit.

    Args:
        asker: the run.
    """

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        self.inputs = RunInputs(asker.sample_encoder("prompt"))

    def write(self, batch: Sequence[Sample], sampling: Sequence[Sampling]) -> list[Answer]:
        """As `Captioner.write`; the text is that of `Asker.stream`."""
        texts, cut = [""] * len(batch), [False] * len(batch)
        for pieces in self.asker.stream(batch, sampling):
            for row, piece in enumerate(pieces):
                if piece is not None:
                    texts[row] += piece.text
                    cut[row] = piece.ended == "length"
        return [Answer(*one) for one in zip(texts, cut, strict=True)]
