"""Which batches a step is planned with: one as they usually are, and the heaviest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from lit_vlm.core.batch import ENCODER, BadSample, Batch, Images, VisualTokens, Window
from lit_vlm.data import VLMData
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.loader import SourceDataset, assemble
from lit_vlm.data.feed.plan import Place
from lit_vlm.data.records import RecordError, Text, Videos, image_bytes
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sources import Source
from lit_vlm.encoders import Encoder
from lit_vlm.heads import Head
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.training.module import LitVLM

SAMPLED = 48
"""Micro-batches whose lengths are looked at."""
TRIED, WHOLE = 8, 0.9
"""Batches that are put together in search of one that has this share of the positions that its lengths say."""


@dataclass
class Chosen:
    """The batches of a planned step.

    Attributes:
        typical: the micro-batch whose positions are nearest to the mean.
        heaviest: one of the longest samples that were met.
        mean: means over micro-batches: samples, tokens of padded rows, images.
        per_epoch: micro-batches of an epoch on each rank.
        record_bytes: mean bytes of a record's pictures and text.
    """

    typical: Batch
    heaviest: Batch
    mean: dict[str, float]
    per_epoch: int
    record_bytes: float


def choose(module: LitVLM, data: VLMData, global_batch: GlobalBatch, prepared: Sequence[str]) -> Chosen:
    """Choose the batches by the lengths of a few that training would take.

    Args:
        module: with its model, whose parameters may be on the meta device.
        data: the data of the stage.
        global_batch: how rows are dealt out to ranks.
        prepared: heads, or `encoder`, whose features come with the batch.

    Raises:
        ValueError: where no sample of those that are looked at can be used.
    """
    spec = module.input_spec
    sources = data.train_sources
    # Packed rows are dealt out fullest first, so a rank in the middle has what is usual.
    plan = data.plan(sources, spec, global_batch.world_size // 2, global_batch, shuffle=True)
    encode = data.sample_encoder(spec)
    dataset = SourceDataset(sources, encode)
    places = list(islice(iter(plan), SAMPLED))
    if len(places) == len(plan) > 1:
        places.pop()  # the last batch of an epoch may be a short one
    look = _Look(sources, encode)
    shapes = np.array([look.shape(batch) for batch in places], dtype=np.float64)
    if not len(shapes) or not look.sizes:
        raise ValueError("no sample of data.train can be used, so there is no batch to plan with")
    collate = data.collator(spec, prepared=tuple(spec.known))
    mean = dict(zip(("samples", "positions", "images", "tokens"), shapes.mean(0).tolist(), strict=True))

    def made(batch: Sequence[Place]) -> Batch:
        whole = assemble([dataset[place] for place in batch], collate)
        return _with_window(_with_features(module.vlm, whole, prepared), spec)

    nearest = [places[i] for i in np.abs(shapes[:, 1] - mean["positions"]).argsort(kind="stable")]
    longest = sorted(places, key=lambda batch: look.shape(batch)[1:3], reverse=True)
    if not plan.ordering.batching.packs:
        longest = [_longest(look, dataset, global_batch.batch_size), *longest]
    typical, heaviest = (_first_whole(order, look, made) for order in (nearest, longest))
    return Chosen(typical, heaviest, mean, len(plan), look.mean_bytes())


class _Look:
    """Lengths of samples, by their place; each is measured once."""

    def __init__(self, sources: Sequence[Source], encode: SampleEncoder) -> None:
        self.sources, self.encode = sources, encode
        self.sizes: dict[int, tuple[int, int]] = {}

    def _size(self, sample: int) -> tuple[int, int]:
        if sample not in self.sizes:
            source, index = self._where(sample)
            try:
                self.sizes[sample] = self.encode.measure(source.outline(index), source)
            except RecordError:
                return (0, 0)
        return self.sizes[sample]

    def _where(self, sample: int) -> tuple[Source, int]:
        for source in self.sources:
            if sample < len(source):
                return source, sample
            sample -= len(source)
        raise IndexError(sample)

    def shape(self, places: Sequence[Place]) -> tuple[int, int, int, int]:
        """Samples, positions with padding, images and tokens of a batch."""
        rows: dict[int, int] = {}
        images = 0
        for place in places:
            length, count = self._size(place.sample)
            rows[place.row] = rows.get(place.row, 0) + length
            images += count
        return len(places), max(rows.values(), default=0) * len(rows), images, sum(rows.values())

    def mean_bytes(self) -> float:
        """Bytes of a record's pictures and text as they are read, over a few records."""
        total = 0
        some = list(self.sizes)[:16]
        for sample in some:
            source, index = self._where(sample)
            total += record_bytes(source, index)
        return total / max(1, len(some))


def record_bytes(source: Source, index: int) -> int:
    """Bytes of a record's pictures, as files or in memory, and of its text."""
    record = source.record(index)
    parts = [part for message in record.messages for part in message.content]
    with Videos() as videos:
        return sum(
            len(part.text) if isinstance(part, Text) else len(image_bytes(part, source.image_folder, videos))
            for part in parts
        )


def _first_whole(order: Sequence[Sequence[Place]], look: _Look, made: Callable[[Sequence[Place]], Batch]) -> Batch:
    """The first batch that is as long as its lengths say: of a sample that is cut, nothing supervised may be left.

    Where none of a few is, the fullest of them.
    """
    best: tuple[float, Batch] | None = None
    for places in order[:TRIED]:
        batch = made(places)
        share = batch.counts.positions / max(1, look.shape(places)[1])
        if share >= WHOLE:
            return batch
        if best is None or share > best[0]:
            best = (share, batch)
    assert best is not None
    return best[1]


def _longest(look: _Look, dataset: SourceDataset, batch_size: int) -> list[Place]:
    """A batch of the longest samples that can be used, one per row."""
    chosen: list[int] = []
    for sample in sorted(look.sizes, key=lambda sample: look.sizes[sample], reverse=True)[: TRIED * batch_size]:
        if not isinstance(dataset[Place(0, sample)].items, BadSample):
            chosen.append(sample)
        if len(chosen) == batch_size:
            break
    chosen = (chosen * batch_size)[:batch_size]
    return [Place(row, sample) for row, sample in enumerate(chosen)]


def _with_window(batch: Batch, spec: InputSpec) -> Batch:
    own = {name: count(batch) for name, count in spec.own_counts.items()}
    return replace(batch, window=Window(batch.counts, own))


def _with_features(model: VLM, batch: Batch, names: Sequence[str]) -> Batch:
    """Features without meaning, in the place of pictures that a network would look at."""
    prepared: dict[str, VisualTokens] = dict(batch.prepared)
    for name in names:
        if name == ENCODER:
            prepared[name] = _features(model.encoder, batch.images)
            continue
        head = model.heads[name]
        if isinstance(head, Head) and isinstance(head.teacher, EncoderTeacher):
            prepared[name] = _features(head.teacher.encoder, batch.teacher_images.get(name, batch.images))
    kept: Mapping[str, Images] = {k: v for k, v in batch.teacher_images.items() if k not in names}
    images = Images(batch.images.pixels[:0], ()) if ENCODER in names else batch.images
    return replace(batch, prepared=prepared, teacher_images=dict(kept), images=images)


def _features(encoder: Encoder, images: Images) -> VisualTokens:
    grids = tuple(encoder.patch_grid(*size) for size in images.sizes)
    rows = sum(grid.num_tokens for grid in grids)
    return VisualTokens(torch.zeros(rows, encoder.width, dtype=torch.bfloat16), grids)
