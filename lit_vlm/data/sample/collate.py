"""From samples to a `Batch`: padded, packed, or left-padded prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_vlm.core.batch import (
    IGNORE,
    NO_OPENING,
    BadSample,
    Batch,
    Images,
    SampleInfo,
    VisualTokens,
    fill,
    find_targets,
)
from lit_vlm.core.tiling import Tiling
from lit_vlm.data.sample.encode import Sample


def collate(samples: Sequence[Sample], bad: Sequence[BadSample] = (), pad_id: int = 0) -> Batch:
    """Make a batch with one sample per row, padded on the right."""
    return make_rows([[sample] for sample in samples], bad, pad_id)


def collate_prompts(samples: Sequence[Sample], bad: Sequence[BadSample] = (), pad_id: int = 0) -> Batch:
    """Make a batch of prompts for generation: one per row, padded on the left, so that all end at the last position."""
    return make_rows([[sample] for sample in samples], bad, pad_id, left=True)


def make_rows(
    rows: Sequence[Sequence[Sample]],
    bad: Sequence[BadSample] = (),
    pad_id: int = 0,
    left: bool = False,
    prepared: Sequence[str] = (),
    length: int = 0,
) -> Batch:
    """Make a batch of samples laid out in rows.

    A batch whose samples were all bad is one row of padding: other ranks have work, and every rank must take the step.

    Args:
        rows: the samples of each row.
        bad: samples that were left out.
        pad_id: token id at padding.
        left: pad in front instead of behind.
        prepared: heads or `encoder` whose features were prepared; a batch has an entry for each, also without images.
        length: positions of a row at least; longer rows make it longer.
    """
    lengths = [sum(len(sample) for sample in row) for row in rows] or [1]
    shape = (len(lengths), max(length, *lengths))
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment_ids = torch.zeros(shape, dtype=torch.long)
    infos: list[SampleInfo] = []
    image_positions: list[torch.Tensor] = []
    for index, row in enumerate(rows):
        start = shape[1] - lengths[index] if left else 0
        for segment, sample in enumerate(row, 1):
            end = start + len(sample)
            input_ids[index, start:end] = torch.tensor(sample.ids)
            labels[index, start + 1 : end] = torch.tensor(sample.labels[1:])
            position_ids[index, start:end] = torch.arange(len(sample))
            segment_ids[index, start:end] = segment
            base = index * shape[1] + start
            for image_start, grid in zip(sample.image_starts, sample.grids, strict=True):
                image_positions.append(torch.arange(grid.num_tokens) + base + image_start)
            infos.append(
                SampleInfo(
                    index, segment, sample.id, sample.source, len(sample.grids), sample.num_supervised, len(sample)
                )
            )
            start = end
        if not left and row:
            # Padding goes on counting, so that a row of one sample is a plain range: see `Batch.position_ids`.
            position_ids[index, start:] = torch.arange(len(row[-1]), len(row[-1]) + shape[1] - start)
    ordered = [sample for row in rows for sample in row]
    positions, targets = find_targets(labels)
    names = {name for sample in ordered for name in sample.teacher_images}
    notes = [sample.note for sample in ordered if sample.note]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        segment_ids=segment_ids,
        images=Images.pack([image for sample in ordered for image in sample.images]),
        image_grids=tuple(grid for sample in ordered for grid in sample.grids),
        image_positions=torch.cat(image_positions) if image_positions else torch.empty(0, dtype=torch.long),
        target_positions=positions,
        targets=targets,
        num_tokens=sum(len(sample) for sample in ordered),
        samples=tuple(infos),
        teacher_images={
            name: Images.pack([image for sample in ordered for image in sample.teacher_images.get(name, ())])
            for name in sorted(names)
        },
        prepared={name: _features(ordered, name) for name in prepared},
        bad=(*bad, *notes),
        stop_ids=frozenset().union(*(sample.stop_ids for sample in ordered)),
        opening=next((sample.opening for sample in ordered), NO_OPENING),  # the same for all, as they share a template
        tilings=_tilings(ordered),
        segments=None if left else tuple(fill([len(sample) for sample in row], shape[1]) for row in rows) or ((1,),),
    )


def _tilings(samples: Sequence[Sample]) -> tuple[Tiling | None, ...]:
    """How tiles make up the images, in order; empty where there is no image of tiles."""
    found = [tiling for one in samples for tiling in one.tilings or [None] * len(one.grids)]
    return tuple(found) if any(found) else ()


def _features(samples: Sequence[Sample], name: str) -> VisualTokens:
    """The prepared features under one name (a head's, or `encoder`) of all images in order."""
    pairs = [pair for sample in samples for pair in sample.features.get(name, ())]
    features = torch.cat([features for features, _ in pairs]) if pairs else torch.empty(0, 0)
    return VisualTokens(features, tuple(grid for _, grid in pairs))
