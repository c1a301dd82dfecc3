"""The sequence that an embedder's layers see, where images have more tokens in it than in the decoder's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_vlm.core.batch import Batch, Grid


@dataclass
class OwnSequence:
    """A batch as the layers see it, `[b, l]`.

    Attributes:
        input_ids: `[b, l]`.
        position_ids: `[b, l]`, restarting in each segment.
        image_positions: index into b·l of each visual token before it is merged.
        places: `[b, s]`, where each position of the batch is in its row of l; None if it is the same sequence.
        sources: `[b, l]`, the other way; −1 where nothing stands.
        ahead: `[b, 1]`, how many more positions a row has here.
    """

    input_ids: Tensor
    position_ids: Tensor
    image_positions: Tensor
    places: Tensor | None
    sources: Tensor | None
    ahead: Tensor

    @staticmethod
    def same(batch: Batch) -> OwnSequence:
        """No other than the decoder's."""
        ahead = torch.zeros_like(batch.position_ids[:, :1])
        return OwnSequence(batch.input_ids, batch.position_ids, batch.image_positions, None, None, ahead)

    def mask(self, attention_mask: Tensor) -> Tensor:
        """For the positions of this batch `[b, l]`, from the decoder's mask `[b, past + s]`."""
        if self.sources is None:
            return attention_mask[:, -self.input_ids.shape[1] :]
        return attention_mask.gather(1, self.sources.clamp(min=0)) * (self.sources >= 0)


def own_lengths(batch: Batch, factor: int) -> list[int]:
    """Positions of each sample where each visual token has `factor` positions in place of one."""
    grids = iter(batch.image_grids)
    visual = [sum(next(grids).num_tokens for _ in range(sample.num_images)) for sample in batch.samples]
    return [sample.num_tokens + (factor - 1) * seen for sample, seen in zip(batch.samples, visual, strict=True)]


def refine(batch: Batch, factor: int, right: bool) -> OwnSequence:
    """Give each visual token `factor` positions in place of one.

    All of it is done for the whole batch at once; lengths come from plain integers, so it never waits for a device.

    Args:
        batch: with images.
        factor: patches that become one token.
        right: rows end together, for prompts that are padded on the left; otherwise they begin together.
    """
    ids, (b, s), device = batch.input_ids, batch.input_ids.shape, batch.input_ids.device
    images, tokens = [0] * b, [0] * b
    grids = iter(batch.image_grids)
    for sample in batch.samples:
        images[sample.row] += sum(next(grids).num_tokens for _ in range(sample.num_images))
        tokens[sample.row] += sample.num_tokens
    length = max(n + (factor - 1) * t for n, t in zip(tokens, images, strict=True))
    ahead = (factor - 1) * torch.tensor(images)[:, None]
    shift = (length - s - ahead if right else torch.zeros_like(ahead)).to(device, non_blocking=True)
    ahead = ahead.to(device, non_blocking=True)

    counts = torch.ones_like(ids).flatten().index_fill(0, batch.image_positions, factor).view(b, s)
    ends = counts.cumsum(1)
    begins = ends - counts
    places = torch.arange(length, device=device) - shift  # counted from each row's own begin
    sources = torch.searchsorted(ends, places, right=True).clamp(max=s - 1)
    first = (torch.arange(s, device=device) - batch.position_ids).clamp(min=0)  # of the segment
    position_ids = (places - begins.gather(1, first).gather(1, sources)).clamp(min=0)
    within = (begins + shift).clamp(min=0, max=length - 1)
    row = batch.image_positions // s
    starts = row * length + (begins + shift).flatten()[batch.image_positions]
    image_positions = (starts[:, None] + torch.arange(factor, device=device)).flatten()
    sources_or_none = torch.where(places >= 0, sources, -1)
    return OwnSequence(ids.gather(1, sources), position_ids, image_positions, within, sources_or_none, ahead)


def see_whole_images(own: OwnSequence, grids: Sequence[Grid], mask: Tensor | None) -> Tensor:
    """Who sees whom, if the tokens of an image see all of it: bool `[b, 1, l, l]`.

    Args:
        own: the sequence.
        grids: of its images.
        mask: `[b, l]`, 0 for padding; None where segments tell.
    """
    ids, device = own.input_ids, own.input_ids.device
    lengths = torch.tensor([grid.num_tokens for grid in grids])
    number = torch.arange(1, len(grids) + 1).repeat_interleave(lengths).to(device, non_blocking=True)
    image = torch.zeros_like(ids).flatten().index_copy(0, own.image_positions, number).view_as(ids)
    segment = (own.position_ids == 0).cumsum(1)
    order = torch.arange(ids.shape[1], device=device)
    seen = (order[:, None] >= order) & (segment[:, :, None] == segment[:, None])
    seen = seen | ((image[:, :, None] == image[:, None]) & (image > 0)[:, None])
    if mask is not None:
        seen = seen & (mask[:, None] > 0) | (order[:, None] == order)
    return seen[:, None]
