"""Scores on held-out records: loss, exact match, word F1, and multiple choice by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

import torch
import torch.distributed as dist

from lit_vlm.core.progress import progress
from lit_vlm.data.records import Record
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.metrics import exact_match, token_f1


class Answer(NamedTuple):
    """A model's answer to the last question of one record."""

    record: Record
    question: str
    expected: str
    given: str


@dataclass(frozen=True)
class Judged:
    """How a model did on one held-out record.

    Attributes:
        id: id of the record, unique in its source.
        source: name of the source.
        expected: the expected answer.
        answer: what the model wrote.
        nll: negative log-likelihood of the expected answer, in nats.
        tokens: number of tokens that `nll` sums over.
        exact_match: 1 where the answer is the expected one, normalised, else 0.
        token_f1: F1 over words.
        choice: the likeliest of the record's options; None without options.
        choice_accuracy: 1 where that is the expected answer, else 0; None without options.
        choice_chance: 1 / number of options; None without options.
    """

    id: str
    source: str
    expected: str
    answer: str
    nll: float
    tokens: int
    exact_match: float
    token_f1: float
    choice: str | None = None
    choice_accuracy: float | None = None
    choice_chance: float | None = None


@dataclass(frozen=True)
class HeldOutScores:
    """Scores over held-out records.

    Attributes:
        loss: mean negative log-likelihood of the expected answers' tokens, in nats.
        exact_match: share of generated answers that are the expected one, normalised.
        token_f1: mean F1 over words.
        choice_accuracy: share of records with options whose likeliest option is the expected one; None without any.
        choice_chance: accuracy of guessing: the mean of 1 / number of options; None without any.
        num_records: records that were scored.
        num_choices: records with options that were scored.
        by_source: the scores of each source, of one that is alone as well.
    """

    loss: float
    exact_match: float
    token_f1: float
    choice_accuracy: float | None
    choice_chance: float | None
    num_records: int
    num_choices: int
    by_source: dict[str, HeldOutScores] = field(default_factory=dict)


@torch.no_grad()
def judge_held_out(
    asker: Asker,
    records: Sequence[Record],
    batch_size: int = 32,
    max_new_tokens: int = 16,
    title: str | None = None,
) -> list[Judged]:
    """Ask a model held-out records, and judge each answer; ranks share the records.

    Args:
        asker: whose model is asked.
        records: each ends with the expected answer.
        batch_size: records at a time.
        max_new_tokens: length of an answer at most.
        title: title of the progress bar that the first rank shows; None shows no bar.

    Returns:
        the answers of all ranks, in the order of the records.

    Raises:
        RecordError: for a record that cannot be asked; `held_out_records` leaves those out.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # All ranks run the same number of batches, as sharded parts run on all ranks together; records may repeat.
    per_rank = -(-len(records) // world)
    mine = list(records[rank::world])
    padded = mine + [records[0]] * (per_rank - len(mine))
    found: list[Judged] = []
    with progress(title or "", per_rank, shown=title is not None and rank == 0) as advance:
        for start in range(0, per_rank, batch_size):
            chunk = padded[start : start + batch_size]
            found += _judge(asker, chunk, max_new_tokens)
            advance(len(chunk))
    parts = [found[: len(mine)]]  # those that keep ranks in step are not counted
    if world > 1:
        parts = [[] for _ in range(world)]
        dist.all_gather_object(parts, found[: len(mine)])
    return [parts[index % world][index // world] for index in range(len(records))]


def held_out_scores(judged: Sequence[Judged]) -> HeldOutScores:
    """The scores over all answers, and those of each source."""
    sources = sorted({one.source for one in judged})
    scores = _means(judged)
    return replace(scores, by_source={name: _means([one for one in judged if one.source == name]) for name in sources})


@torch.no_grad()
def answer_records(asker: Asker, records: Sequence[Record], max_new_tokens: int = 16) -> list[Answer]:
    """Greedy answers to the last question of each record; under sharded training every rank must call this.

    Raises:
        RecordError: for a record that cannot be asked.
    """
    given = asker.answer(asker.encode(records), max_new_tokens)
    questions = [next(m.text for m in reversed(record.messages) if m.role == "user").strip() for record in records]
    return [
        Answer(record, question, record.messages[-1].text, answer)
        for record, question, answer in zip(records, questions, given, strict=True)
    ]


def _means(judged: Sequence[Judged]) -> HeldOutScores:
    right = [one.choice_accuracy for one in judged if one.choice_accuracy is not None]
    chance = [one.choice_chance for one in judged if one.choice_chance is not None]
    return HeldOutScores(
        loss=sum(one.nll for one in judged) / max(1, sum(one.tokens for one in judged)),
        exact_match=fmean(one.exact_match for one in judged),
        token_f1=fmean(one.token_f1 for one in judged),
        choice_accuracy=fmean(right) if right else None,
        choice_chance=fmean(chance) if chance else None,
        num_records=len(judged),
        num_choices=len(right),
    )


def _judge(asker: Asker, records: Sequence[Record], max_new_tokens: int) -> list[Judged]:
    given = asker.answer(asker.encode(records), max_new_tokens)
    scored = asker.score_answers(records)
    found = []
    for record, answer, (nll, tokens), chosen in zip(records, given, *scored, strict=True):
        expected = record.messages[-1].text
        exact, f1 = exact_match(answer, expected), token_f1(answer, expected)
        one = Judged(record.id, record.source, expected, answer, nll, tokens, exact, f1)
        if record.options:
            right, chance = float(chosen == expected), 1 / len(record.options)
            one = replace(one, choice=chosen, choice_accuracy=right, choice_chance=chance)
        found.append(one)
    return found
