"""Batched generation, and likelihoods of given answers, with a key-value cache."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lit_vlm.core.batch import IGNORE, Batch
from lit_vlm.core.sampling import Sampling
from lit_vlm.model.vlm import VLM


@torch.no_grad()
def stream(
    model: VLM, batch: Batch, stop_ids: Collection[int], sampling: Sequence[Sampling]
) -> Iterator[list[int | None]]:
    """Continue each row of a batch of prompts, and hand over each token as soon as it is known.

    Under sharded training every rank must call this together; it runs until the last rank has finished.

    Args:
        model: in eval mode.
        batch: left-padded prompts, one sample per row.
        stop_ids: ids that end a row; the first of them ends it and is not handed over.
        sampling: how each row is continued; rows without one, which fill a batch, end with the others.

    Yields:
        after each step the new token of each row, or None where the row has ended. A row that ends on a stop id has
        None from the step of that id on.

    Raises:
        ValueError: as `VLM.new_cache`.
    """
    cache = model.new_cache()
    mask = (batch.segment_ids > 0).long()
    positions = batch.position_ids[:, -1:]
    stops = set(stop_ids)
    drawing = _drawing(sampling, mask.device)
    room = [one.max_new_tokens for one in sampling] + [0] * (len(mask) - len(sampling))
    step = batch
    for index in range(max(room)):
        drawn = _draw(model.next_logits(step, cache, mask, start=index == 0).float(), drawing)
        ids = [
            None if index >= most or token in stops else token for token, most in zip(drawn.tolist(), room, strict=True)
        ]
        room = [0 if token is None else most for token, most in zip(ids, room, strict=True)]
        yield ids
        if _all_done(all(index + 1 >= most for most in room), mask.device):
            break
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = batch.text_only(drawn[:, None], positions)  # what rows are given that have ended reaches no other


def generate(
    model: VLM,
    batch: Batch,
    stop_ids: Collection[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Continue each row of a batch of prompts, all in the same way; see `stream`.

    Returns:
        new token ids of each row, without the one that ended it.
    """
    rows: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
    for ids in stream(model, batch, stop_ids, [Sampling(max_new_tokens, temperature, top_p)] * len(rows)):
        for row, token in zip(rows, ids, strict=True):
            if token is not None:
                row.append(token)
    return rows


class _Drawing(NamedTuple):
    """Rows that are drawn in the same way, what is done to their logits, and the generators of those with a seed."""

    rows: Tensor
    warpers: LogitsProcessorList
    own: list[random.Random]


def _drawing(sampling: Sequence[Sampling], device: torch.device) -> list[_Drawing]:
    """The rows whose setting draws, by setting."""
    rows: dict[tuple[float, float, bool], list[int]] = {}
    for row, one in enumerate(sampling):
        if one.temperature > 0:
            rows.setdefault((one.temperature, one.top_p, one.seed is None), []).append(row)
    return [
        _Drawing(
            torch.tensor(found, device=device),
            warpers(temperature, top_p),
            [] if shared else [random.Random(sampling[row].seed) for row in found],
        )
        for (temperature, top_p, shared), found in rows.items()
    ]


def warpers(temperature: float, top_p: float) -> LogitsProcessorList:
    """What a temperature above 0 and a share of the likeliest tokens do to logits before one is drawn."""
    found = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found


def draw_apart(shares: Tensor, own: Sequence[random.Random]) -> Tensor:
    """Draw from each row of probabilities `[b, v]` by one number of the row's own generator; returns ids `[b]`."""
    sums = shares.double().cumsum(-1)
    levels = torch.tensor([one.random() for one in own], dtype=sums.dtype, device=sums.device)
    return torch.searchsorted(sums, levels[:, None] * sums[:, -1:], right=True)[:, 0]


def _draw(logits: Tensor, drawing: Sequence[_Drawing]) -> Tensor:
    """The next token `[b]` of each row, drawn where its setting says so; else the likeliest."""
    ids = logits.argmax(-1)
    for rows, warped, own in drawing:
        shares = warped(ids[rows, None], logits[rows]).softmax(-1)
        ids[rows] = draw_apart(shares, own) if own else torch.multinomial(shares, 1)[:, 0]
    return ids


class Continuation(NamedTuple):
    """Text that follows a prefix.

    Attributes:
        row: row of the prefix in its batch.
        ids: token ids of the text.
        labels: aligned with `ids`, -100 where nothing is scored. The first label is predicted by the prefix.
    """

    row: int
    ids: Sequence[int]
    labels: Sequence[int]


@torch.no_grad()
def score_continuations(
    model: VLM, prefixes: Batch, continuations: Sequence[Continuation], batch_size: int = 64
) -> list[float]:
    """Score each continuation by its likelihood; a prefix with its images runs once, however many texts continue it.

    Under sharded training every rank must call this together.

    Args:
        model: in eval mode.
        prefixes: left-padded prompts, one per row.
        continuations: texts that continue any of the rows, in any order.
        batch_size: continuations at a time.

    Returns:
        summed negative log-likelihood of the labels of each continuation, in nats.

    Raises:
        ValueError: as `VLM.new_cache`.
    """
    cache = model.new_cache()
    mask = (prefixes.segment_ids > 0).long()
    first = model.next_logits(prefixes, cache, mask, start=True).float().log_softmax(-1).cpu()
    device = mask.device
    scores: list[float] = []
    for index in range(_most(-(-len(continuations) // batch_size), device)):
        chunk = continuations[index * batch_size : (index + 1) * batch_size]
        # Without a chunk of its own a rank still takes part: sharded parts run on all ranks or on none.
        taken = chunk or [Continuation(0, [0, 0], [0, 0])]
        shape = (len(taken), max(len(one.ids) for one in taken))
        ids, labels, own = torch.zeros(shape).long(), torch.full(shape, IGNORE), torch.zeros(shape).long()
        for line, one in enumerate(taken):
            length = len(one.ids)
            ids[line, :length], labels[line, :length] = torch.tensor(one.ids), torch.tensor(one.labels)
            own[line, :length] = 1
        rows = torch.tensor([one.row for one in taken], device=device)
        positions = mask.sum(1)[rows, None] + torch.arange(shape[1], device=device)
        # Which places are scored is found on the CPU, as in the collator.
        step = prefixes.text_only(ids, positions, labels).to(device)
        whole_mask = torch.cat([mask[rows], own.to(device)], dim=1)
        nll = model.target_nll(step, model.select_cache(cache, rows), whole_mask).cpu().double()
        owner = torch.arange(len(taken)).repeat_interleave((labels[:, 1:] != IGNORE).sum(1))
        of_first = F.nll_loss(first[rows.cpu()], labels[:, 0], ignore_index=IGNORE, reduction="none").double()
        scores += of_first.index_add(0, owner, nll).tolist()[: len(chunk)]
    return scores


def _most(count: int, device: torch.device) -> int:
    """The largest count of all ranks."""
    if not dist.is_initialized():
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _all_done(done: bool, device: torch.device) -> bool:
    """Whether every row of every rank has ended: sharded parts run on all ranks or on none."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        left = torch.tensor(float(not done), device=device)
        dist.all_reduce(left)
        return not left.item()
    return done
