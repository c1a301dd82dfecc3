"""An embedder's own sequence: the one that its layers see, with more tokens per image than the decoder's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_vlm.core.batch import Batch, Segments, fill
from lit_vlm.core.transfer import send


@dataclass
class OwnSequence:
    """A batch as an embedder's layers see it: b rows of l positions.

    Attributes:
        input_ids: `[b, l]`; at image positions the id means nothing.
        position_ids: `[b, l]`, restarting in each segment.
        image_positions: index into b·l of each visual token before it is merged.
        places: `[b, s]`, index into its row of l of each position of the batch (of an image token, its first patch);
            None if both sequences are the same.
        sources: `[b, l]`, index into its row of s of the batch's position that each position here comes from; −1 for
            padding in front; None if both sequences are the same.
        ahead: `[b, 1]`, how many more positions a row has here than in the batch.
        segments: lengths of the segments of each row, as in `Batch.segments`.
    """

    input_ids: Tensor
    position_ids: Tensor
    image_positions: Tensor
    places: Tensor | None
    sources: Tensor | None
    ahead: Tensor
    segments: Segments | None

    @staticmethod
    def same(batch: Batch) -> OwnSequence:
        """The decoder's own sequence, for a batch whose images have as many tokens in the layers as in it."""
        ahead = torch.zeros_like(batch.position_ids[:, :1])
        return OwnSequence(
            batch.input_ids, batch.position_ids, batch.image_positions, None, None, ahead, batch.segments
        )

    def mask(self, attention_mask: Tensor) -> Tensor:
        """Attention mask of the positions of this sequence.

        Args:
            attention_mask: `[b, past + s]`, the decoder's mask, 0 for padding.

        Returns:
            `[b, l]`, 0 for padding.
        """
        if self.sources is None:
            return attention_mask[:, -self.input_ids.shape[1] :]
        return attention_mask.gather(1, self.sources.clamp(min=0)) * (self.sources >= 0)


def own_lengths(batch: Batch, factor: int) -> list[int]:
    """Positions of each sample in a sequence where each visual token has `factor` positions in place of one."""
    grids = iter(batch.image_grids)
    visual = [sum(next(grids).num_tokens for _ in range(sample.num_images)) for sample in batch.samples]
    return [sample.num_tokens + (factor - 1) * seen for sample, seen in zip(batch.samples, visual, strict=True)]


def refine(batch: Batch, factor: int, right: bool) -> OwnSequence:
    """Make the sequence in which each visual token has `factor` positions in place of one.

    All rows are made at once; lengths come from plain integers, so this never waits for a device.

    Args:
        batch: a batch with images.
        factor: patches that become one token.
        right: True lets rows end together, for prompts that are padded on the left; False lets them begin together.
    """
    ids, (b, s), device = batch.input_ids, batch.input_ids.shape, batch.input_ids.device
    images, tokens = [0] * b, [0] * b
    grids = iter(batch.image_grids)
    for sample in batch.samples:
        images[sample.row] += sum(next(grids).num_tokens for _ in range(sample.num_images))
        tokens[sample.row] += sample.num_tokens
    length = max(n + (factor - 1) * t for n, t in zip(tokens, images, strict=True))
    ahead = (factor - 1) * torch.tensor(images)[:, None]
    shift = send(length - s - ahead if right else torch.zeros_like(ahead), device)
    ahead = send(ahead, device)

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
    segments = None if batch.segments is None else _own_segments(batch, factor, length)
    return OwnSequence(ids.gather(1, sources), position_ids, image_positions, within, sources_or_none, ahead, segments)


def _own_segments(batch: Batch, factor: int, length: int) -> Segments:
    rows: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
    for sample, own in zip(batch.samples, own_lengths(batch, factor), strict=True):
        rows[sample.row].append(own)
    return tuple(fill(row, length) for row in rows)
