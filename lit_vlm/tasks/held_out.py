"""Scores on held-out records: loss, exact match, word F1, and multiple choice by likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from lit_vlm.batch import IGNORE, Batch
from lit_vlm.data.collate import collate_prompts
from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.encode import Sample, SampleEncoder
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.generate import Continuation, score_continuations
from lit_vlm.metrics import exact_match, token_f1
from lit_vlm.progress import progress
from lit_vlm.tasks.held_out_records import encode_absolute, first_of_last_answer

if TYPE_CHECKING:
    from lit_vlm.module import LitVLM


LONGEST_ANSWER = 512
"""Positions that answers to choose from may have on top of the run's `max_length`."""


class Answer(NamedTuple):
    """What the model said to one record."""

    record: Record
    question: str
    expected: str
    given: str


@dataclass(frozen=True)
class HeldOutScores:
    """Scores over held-out records.

    Attributes:
        loss: mean negative log-likelihood of the expected answers' tokens, in nats.
        exact_match: share of generated answers that are the expected one, normalised.
        token_f1: mean F1 over words.
        choice_accuracy: share of records with options whose likeliest option is the expected one.
        choice_chance: what guessing would give, 1 / options on average.
        num_records: records that were scored.
        num_choices: those of them with options.
        by_source: the same for each source, where there are several.
    """

    loss: float
    exact_match: float
    token_f1: float
    choice_accuracy: float
    choice_chance: float
    num_records: int
    num_choices: int
    by_source: dict[str, HeldOutScores] = field(default_factory=dict)


@torch.no_grad()
def evaluate_held_out(
    module: LitVLM,
    data: VLMData,
    records: Sequence[Record],
    batch_size: int = 32,
    max_new_tokens: int = 16,
    title: str | None = None,
) -> HeldOutScores:
    """Score records; ranks share the work.

    Args:
        module: with its model built; it is put into eval mode for the while.
        data: whose template and transform are used.
        records: each ends with the expected answer.
        batch_size: records at a time.
        max_new_tokens: length of an answer at most.
        title: of the progress that the first rank shows; None shows none.

    Returns:
        the scores over all ranks, of each source too.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # Ranks run the same number of batches, or the sharded parts would wait for each other: the last may be repeated.
    per_rank = -(-len(records) // world)
    mine = list(records[rank::world])
    padding = [records[0]] * (per_rank - len(mine))
    sources = sorted({record.source for record in records})
    totals = torch.zeros(len(sources), len(_Sums._fields), dtype=torch.float64)
    with progress(title or "", per_rank, shown=title is not None and rank == 0) as advance, _evaluating(module):
        for start in range(0, per_rank, batch_size):
            chunk = (mine + padding)[start : start + batch_size]
            found = _score_batch(module, data, chunk, max_new_tokens)
            # What only keeps ranks in step is scored and not counted.
            for record, sums in zip(chunk[: max(0, len(mine) - start)], found, strict=False):
                totals[sources.index(record.source)] += torch.tensor(sums, dtype=torch.float64)
            advance(len(chunk))
    if world > 1:
        moved = totals.to(module.device, torch.float32)
        dist.all_reduce(moved)
        totals = moved.cpu().double()
    scores = _means(_Sums(*totals.sum(0).tolist()))
    if len(sources) == 1:
        return scores
    rows = zip(sources, totals.tolist(), strict=True)
    return replace(scores, by_source={source: _means(_Sums(*row)) for source, row in rows})


@torch.no_grad()
def answer_records(module: LitVLM, data: VLMData, records: Sequence[Record], max_new_tokens: int = 16) -> list[Answer]:
    """Greedy answers to the last question of each record; under sharded training every rank must call this."""
    with _evaluating(module):
        given = module.answer(_collate_prompts(module, data, records), max_new_tokens)
    questions = [next(m.text for m in reversed(record.messages) if m.role == "user").strip() for record in records]
    return [
        Answer(record, question, record.messages[-1].text, answer)
        for record, question, answer in zip(records, questions, given, strict=True)
    ]


@contextmanager
def _evaluating(module: LitVLM) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was."""
    was_training = module.vlm.training
    module.vlm.eval()
    try:
        yield
    finally:
        module.vlm.train(was_training)


class _Sums(NamedTuple):
    """What the scores of one or several records are made of."""

    nll: float
    tokens: float
    exact: float
    f1: float
    records: float
    right: float
    chance: float
    choices: float


def _means(sums: _Sums) -> HeldOutScores:
    return HeldOutScores(
        loss=sums.nll / max(1, sums.tokens),
        exact_match=sums.exact / max(1, sums.records),
        token_f1=sums.f1 / max(1, sums.records),
        choice_accuracy=sums.right / max(1, sums.choices),
        choice_chance=sums.chance / max(1, sums.choices),
        num_records=int(sums.records),
        num_choices=int(sums.choices),
    )


def _score_batch(module: LitVLM, data: VLMData, records: Sequence[Record], max_new_tokens: int) -> list[_Sums]:
    """What each record adds."""
    spec = module.input_spec
    given = module.answer(_collate_prompts(module, data, records), max_new_tokens)
    encode = data.format.encoder(spec.without_teachers(), extra=LONGEST_ANSWER)
    scored = score_answers(module, encode, records, spec.tokenizer.pad_token_id)
    found = []
    for record, answer, (nll, tokens), chosen in zip(records, given, *scored, strict=True):
        expected, num_options = record.messages[-1].text, len(record.options)
        found.append(
            _Sums(
                nll=nll,
                tokens=tokens,
                exact=exact_match(answer, expected),
                f1=token_f1(answer, expected),
                records=1,
                right=num_options > 0 and chosen == expected,
                chance=1 / num_options if num_options else 0,
                choices=num_options > 0,
            )
        )
    return found


def _collate_prompts(module: LitVLM, data: VLMData, records: Sequence[Record]) -> Batch:
    spec = module.input_spec
    encode = data.encoder(spec, prompt=True)
    return collate_prompts(
        [encode_absolute(encode, record) for record in records], pad_id=spec.tokenizer.pad_token_id
    ).to(module.device)


def score_answers(
    module: LitVLM, encode: SampleEncoder, records: Sequence[Record], pad_id: int
) -> tuple[list[tuple[float, int]], list[str]]:
    """How likely expected answers are, and which options are likeliest; images are given by absolute paths.

    Args:
        module: with its model built, in eval mode.
        encode: for training, not for prompts.
        records: each ends with the expected answer.
        pad_id: token id at padding.

    Returns:
        (nll, tokens) of each record's expected answer, and the likeliest of its options ("" without options).
    """
    answers = [list(dict.fromkeys((record.messages[-1].text, *record.options))) for record in records]
    prefixes: list[Sample] = []
    continuations: list[Continuation] = []
    for row, record in enumerate(records):
        samples = [encode_absolute(encode, _with_answer(record, answer)) for answer in answers[row]]
        start = min(first_of_last_answer(samples[0]), *(_common(samples[0].ids, s.ids) for s in samples))
        prefixes.append(replace(samples[0], ids=samples[0].ids[:start], labels=samples[0].labels[:start]))
        continuations += [Continuation(row, s.ids[start:], s.labels[start:]) for s in samples]
    batch = collate_prompts(prefixes, pad_id=pad_id).to(module.device)
    with module.autocast():
        nll = score_continuations(module.vlm, batch, continuations, 2 * len(records))
    counts = [sum(label != IGNORE for label in one.labels) for one in continuations]
    scored = iter(zip(nll, counts, strict=True))
    found = [{answer: next(scored) for answer in options} for options in answers]
    expected = [scores[record.messages[-1].text] for scores, record in zip(found, records, strict=True)]
    likeliest = [
        min((scores[option][0], option) for option in record.options)[1] if record.options else ""
        for scores, record in zip(found, records, strict=True)
    ]
    return expected, likeliest


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_answer(record: Record, answer: str) -> Record:
    # An answer that is scored may be blank, as an option may: encoding refuses that only where it would be taught.
    return replace(record, messages=(*record.messages[:-1], Message("assistant", (Text(answer),))), options=(answer,))
