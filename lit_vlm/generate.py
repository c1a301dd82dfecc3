"""Batched generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from lit_vlm.batch import Batch
from lit_vlm.model import VLM


@torch.no_grad()
def generate(
    model: VLM,
    batch: Batch,
    stop_ids: Collection[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Continue each row of a batch of prompts.

    Under sharded training every rank must call this together; it runs until the last rank has finished.

    Args:
        model: in eval mode.
        batch: left-padded prompts, one sample per row.
        stop_ids: a row ends with the first of these; it is not returned.
        max_new_tokens: tokens per row at most.
        temperature: 0 takes the likeliest token; above, one is drawn.
        top_p: draw from the smallest set of tokens with this probability.

    Returns:
        new token ids of each row.
    """
    warpers = LogitsProcessorList()
    if temperature > 0:
        warpers.append(TemperatureLogitsWarper(temperature))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
    cache = model.decoder.new_cache()
    mask = (batch.segment_ids > 0).long()
    positions = batch.position_ids[:, -1:]
    stops = torch.tensor(sorted(stop_ids), device=mask.device)
    done = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    columns: list[Tensor] = []
    step = batch
    for index in range(max_new_tokens):
        logits = model.next_logits(step, cache, mask, start=index == 0).float()
        if temperature > 0:
            logits = warpers(step.input_ids, logits)
            ids = torch.multinomial(logits.softmax(-1), 1)
        else:
            ids = logits.argmax(-1, keepdim=True)
        ids = torch.where(done[:, None], stops[0], ids)
        columns.append(ids)
        done |= torch.isin(ids[:, 0], stops)
        if _all_done(done):
            break
        positions = positions + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = batch.text_only(ids, positions)
    stopped = set(stop_ids)
    rows = torch.cat(columns, dim=1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stopped), len(row))] for row in rows]


def _all_done(done: Tensor) -> bool:
    """Whether every row of every rank has ended: sharded parts run on all ranks or on none."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        left = (~done).any().float()
        dist.all_reduce(left)
        return not left.item()
    return bool(done.all())
