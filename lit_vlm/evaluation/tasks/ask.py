"""Asking a model the examples of a task: encoded prompts, generated answers and likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.batch import IGNORE
from lit_vlm.data.records import Record, RecordError
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sets.parallel import heed_parent_alone
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.tasks.base import Choosing, Example
from lit_vlm.evaluation.tasks.prompts import Prompts, Shots, document
from lit_vlm.model.generate import Continuation

LONGEST_THOUGHT = 256


@dataclass(frozen=True)
class TaskSettings:
    """How a task is run; saved beside its scores.

    Attributes:
        prompt: demonstrations and system text in front of a question.
        choosing: how one of several options is chosen; None leaves it to the task.
        think: the model first writes steps, then the answer.
        limit: number of examples, drawn by the prompt's seed; None takes all.
        batch_size: examples at a time; scores do not depend on it.
        workers: processes that decode pictures.
        max_new_tokens: length of an answer at most; None leaves it to the task.
        dtype: type of the weights; only written to the files.
        quantise: type of 4 or 8 bits in which the model's blocks are stored; None: they are not.

    Raises:
        ValueError: for a number below 1.
    """

    prompt: Shots = field(default_factory=Shots)
    choosing: Choosing | None = None
    think: bool = False
    limit: int | None = None
    batch_size: int = 16
    workers: int = 0
    max_new_tokens: int | None = None
    dtype: str = ""
    quantise: str | None = None

    @property
    def name(self) -> str:
        """Name for results: that of the prompt, with the type of quantised weights, such as `0-shot-int8`."""
        return self.prompt.name + (f"-{self.quantise}" if self.quantise else "")

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def decisive(self) -> dict[str, Any]:
        """The settings that answers depend on, as plain values."""
        return {key: value for key, value in self.plain().items() if key not in ("batch_size", "workers", "limit")}

    def plain(self) -> dict[str, Any]:
        """All settings as plain values."""
        found = asdict(self)
        if self.quantise is None:  # so that results of versions without it stay comparable
            del found["quantise"]
        return found


class _Encoded(Dataset[tuple[int, Sample | None, dict[str, str]]]):
    """Prompts as (index, sample, reason), encoded in loader processes; the sample is None if it cannot be asked."""

    def __init__(self, records: Sequence[Record], encode: SampleEncoder) -> None:
        self.records, self.encode = records, encode

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, Sample | None, dict[str, str]]:
        try:
            return index, self.encode(self.records[index], Path("/")), {"left_out": ""}
        except RecordError as error:
            return index, None, {"left_out": error.reason, "detail": error.detail}


def ask(
    asker: Asker, prompts: Prompts, examples: Sequence[Example], settings: TaskSettings, length: int, written: bool
) -> Iterator[dict[str, Any]]:
    """Ask examples, and yield for each a line for answers.jsonl.

    Args:
        asker: the model.
        prompts: make the prompt of an example.
        examples: this rank's examples.
        settings: how they are asked.
        length: number of examples that every rank runs, as sharded parts run on all ranks or on none.
        written: whether lines have the text of the prompt.
    """
    if not length:
        return
    padding = list(examples[:1]) or prompts.task.examples[:1]
    padded = [*examples, *[padding[0]] * (length - len(examples))]
    task = prompts.task
    thoughts = settings.think and not task.perplexity
    records = [
        document(example, task.name) if task.perplexity else prompts.record(example, think=thoughts)
        for example in padded
    ]
    loader = DataLoader(
        _Encoded(records, asker.sample_encoder("document" if task.perplexity else "prompt")),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        collate_fn=list,
        worker_init_fn=heed_parent_alone,
        generator=torch.Generator(),  # keeps the global generator, which training draws from, as it is
    )
    for batch in loader:
        asked = [_Asked(padded[index], records[index], sample) for index, sample, _ in batch if sample is not None]
        if not asked and dist.is_initialized():
            asked = [_stand_in(asker, prompts, padded[batch[0][0]])]  # this rank must run a step as the others do
        found = iter(_answers(asker, prompts, settings, asked) if asked else [])
        for index, sample, refusal in batch:
            line: dict[str, Any] = {"id": padded[index].id, "answer": "", "nll": 0.0, "tokens": 0, **refusal}
            if sample is not None:
                line |= next(found)
            if written and not task.perplexity:
                line["prompt"] = asker.written(records[index])
            line["references"] = list(padded[index].references)
            if index < len(examples):  # further ones only keep ranks in step
                yield line


class _Asked(NamedTuple):
    """An example with its prompt, as a record and encoded."""

    example: Example
    record: Record
    sample: Sample


def _stand_in(asker: Asker, prompts: Prompts, example: Example) -> _Asked:
    """A prompt that can always be asked, in place of an example's: without pictures and demonstrations."""
    plain = replace(example, images=(), question="?", turns=())
    if prompts.task.perplexity:
        record = document(plain, prompts.task.name)
        return _Asked(plain, record, asker.sample_encoder("document")(record, Path("/")))
    record = Prompts(prompts.task, Shots(), prompts.choosing).record(plain)
    return _Asked(plain, record, asker.sample_encoder("prompt")(record, Path("/")))


def _answers(asker: Asker, prompts: Prompts, settings: TaskSettings, asked: Sequence[_Asked]) -> list[dict[str, Any]]:
    """The model's answer to each prompt, as fields of its line."""
    task = prompts.task
    if task.perplexity:
        return _likelihoods(asker, [one.sample for one in asked])
    samples = [one.sample for one in asked]
    records = [one.record for one in asked]
    extra: list[dict[str, Any]] = [{} for _ in asked]
    if settings.think:
        thoughts = asker.answer(samples, LONGEST_THOUGHT)
        pairs = [
            _concluding(asker, prompts, one.example, thought) for one, thought in zip(asked, thoughts, strict=True)
        ]
        records = [record for record, _ in pairs]
        samples = [sample for _, sample in pairs]
        extra = [{"thought": thought} for thought in thoughts]
    if records[0].options:
        scored, chosen = asker.score_answers(records)
        found = [
            {"answer": _letter(one.example, option, prompts), "nll": nll, "tokens": tokens}
            for one, option, (nll, tokens) in zip(asked, chosen, scored, strict=True)
        ]
    else:
        given = asker.answer(samples, settings.max_new_tokens or task.max_new_tokens)
        found = [{"answer": answer} for answer in given]
    return [more | line for more, line in zip(extra, found, strict=True)]


def _concluding(asker: Asker, prompts: Prompts, example: Example, thought: str) -> tuple[Record, Sample]:
    """The prompt that asks for the answer after the model's steps; without the steps if they leave no room for it."""
    encode = asker.sample_encoder("prompt")
    record = prompts.record(example, think=True, thought=thought)
    try:
        return record, encode(record, Path("/"))
    except RecordError:
        record = prompts.record(example)
        return record, encode(record, Path("/"))


def _letter(example: Example, option: str, prompts: Prompts) -> str:
    """The letter of an option, which is a letter already where letters are compared."""
    if prompts.choosing == "letter":
        return option
    return replace(example, references=(option,)).letter


def _likelihoods(asker: Asker, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Summed negative log-likelihood of each document after its first token."""
    prefixes = [replace(sample, ids=sample.ids[:1], labels=[IGNORE]) for sample in samples]
    rest = [Continuation(row, sample.ids[1:], sample.labels[1:]) for row, sample in enumerate(samples)]
    found = asker.likelihoods(prefixes, rest, len(samples))
    return [{"nll": nll, "tokens": tokens} for nll, tokens in found]
