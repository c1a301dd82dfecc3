"""Scores on held-out records: loss, exact match, word F1, and multiple choice by likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
class HeldOutScores:
    """Scores over held-out records.

    Attributes:
        loss: mean negative log-likelihood of the expected answers' tokens, in nats.
        exact_match: share of generated answers that are the expected one, normalised.
        token_f1: mean F1 over words.
        choice_accuracy: share of records with options whose likeliest option is the expected one.
        choice_chance: accuracy of guessing: the mean of 1 / number of options.
        num_records: records that were scored.
        num_choices: records with options that were scored.
        by_source: the scores of each source, where there are several.
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
    asker: Asker,
    records: Sequence[Record],
    batch_size: int = 32,
    max_new_tokens: int = 16,
    title: str | None = None,
) -> HeldOutScores:
    """Score a model's answers to records; ranks share the records.

    Args:
        asker: whose model is scored.
        records: each ends with the expected answer.
        batch_size: records at a time.
        max_new_tokens: length of an answer at most.
        title: title of the progress bar that the first rank shows; None shows no bar.

    Returns:
        the scores over all ranks, of each source too.

    Raises:
        RecordError: for a record that cannot be asked; `held_out_records` leaves those out.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # All ranks run the same number of batches, as sharded parts run on all ranks together; records may repeat.
    per_rank = -(-len(records) // world)
    mine = list(records[rank::world])
    padding = [records[0]] * (per_rank - len(mine))
    sources = sorted({record.source for record in records})
    totals = torch.zeros(len(sources), len(_Sums._fields), dtype=torch.float64)
    with progress(title or "", per_rank, shown=title is not None and rank == 0) as advance:
        for start in range(0, per_rank, batch_size):
            chunk = (mine + padding)[start : start + batch_size]
            found = _score_batch(asker, chunk, max_new_tokens)
            # Repeated records are scored, to keep ranks in step, and not counted.
            for record, sums in zip(chunk[: max(0, len(mine) - start)], found, strict=False):
                totals[sources.index(record.source)] += torch.tensor(sums, dtype=torch.float64)
            advance(len(chunk))
    if world > 1:
        moved = totals.to(asker.module.device, torch.float32)
        dist.all_reduce(moved)
        totals = moved.cpu().double()
    scores = _means(_Sums(*totals.sum(0).tolist()))
    if len(sources) == 1:
        return scores
    rows = zip(sources, totals.tolist(), strict=True)
    return replace(scores, by_source={source: _means(_Sums(*row)) for source, row in rows})


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


class _Sums(NamedTuple):
    """Sums over one or several records, of which scores are the means."""

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


def _score_batch(asker: Asker, records: Sequence[Record], max_new_tokens: int) -> list[_Sums]:
    """The sums of each record."""
    given = asker.answer(asker.encode(records), max_new_tokens)
    scored = asker.score_answers(records)
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
