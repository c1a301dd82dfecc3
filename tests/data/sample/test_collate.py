"""From records to samples, and from samples to batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_vlm.core.batch import IGNORE, BadSample, Batch, Grid, PixelSpec, find_targets
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.templates import ChatML
from lit_vlm.data.sample.transforms import Native
from tests.tiny import bins_of, collate_packed

MakeSample = Callable[..., Sample]
PAD = 77


@pytest.fixture
def samples(make_sample: MakeSample) -> list[Sample]:
    grids: list[list[Grid]] = [[], [Grid(2, 3)], [Grid(1, 1), Grid(2, 2, 1, 1)], [Grid(2, 3)], [], [Grid(3, 1)], []]
    return [make_sample(f"s{i}", length, grids[i]) for i, length in enumerate((9, 12, 20, 7, 3, 11, 1))]


def laid_out(batch: Batch, samples: Sequence[Sample]) -> list[tuple[Sample, int, slice]]:
    """Each sample of a batch with its row and its place there, from the order of rows and segments alone."""
    by_id = {sample.id: sample for sample in samples}
    placed, ends = [], dict.fromkeys(range(len(batch.input_ids)), 0)
    for info in batch.samples:
        start = ends[info.row]
        ends[info.row] = start + len(by_id[info.id])
        placed.append((by_id[info.id], info.row, slice(start, ends[info.row])))
    return placed


def naive_targets(labels: Tensor) -> tuple[list[int], list[int]]:
    positions, targets = [], []
    rows, length = labels.shape
    for row in range(rows):
        for place in range(length - 1):
            if labels[row, place + 1] != IGNORE:
                positions.append(row * length + place)
                targets.append(int(labels[row, place + 1]))
    return positions, targets


def check(batch: Batch, samples: Sequence[Sample]) -> None:
    """What holds for every batch that is padded on the right."""
    placed = laid_out(batch, samples)
    assert sorted(sample.id for sample, _, _ in placed) == sorted(sample.id for sample in samples)
    covered = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for sample, row, place in placed:
        assert batch.input_ids[row, place].tolist() == sample.ids
        assert batch.labels[row, place].tolist() == [IGNORE, *sample.labels[1:]]
        assert batch.position_ids[row, place].tolist() == list(range(len(sample)))
        covered[row, place] = True
    assert torch.equal(batch.segment_ids > 0, covered)
    assert (batch.input_ids[~covered] == PAD).all()
    assert (batch.labels[~covered] == IGNORE).all()
    assert batch.num_tokens == int(covered.sum()) == sum(len(sample) for sample in samples)
    flat = batch.input_ids.flatten()
    assert (flat[batch.image_positions] == 0).all()
    assert len(batch.image_positions) == int((flat == 0).sum()) == sum(grid.num_tokens for grid in batch.image_grids)
    assert [(4 * grid.rows, 4 * grid.cols) for grid in batch.image_grids] == list(batch.images.sizes)
    positions, targets = naive_targets(batch.labels)
    assert (batch.target_positions.tolist(), batch.targets.tolist()) == (positions, targets)
    assert batch.counts.supervised == sum(info.num_supervised for info in batch.samples)
    assert batch.counts.images == sum(info.num_images for info in batch.samples)


# ----- find_targets -----


@pytest.mark.parametrize("seed", range(10))
def test_find_targets_equals_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (int(torch.randint(1, 5, (), generator=generator)), int(torch.randint(1, 12, (), generator=generator)))
    labels = torch.randint(0, 50, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.5] = IGNORE
    positions, targets = find_targets(labels)
    assert (positions.tolist(), targets.tolist()) == naive_targets(labels)


# ----- batches -----


def test_padded(samples: list[Sample]) -> None:
    batch = collate(samples, pad_id=PAD)
    check(batch, samples)
    assert batch.input_ids.shape == (7, 20)
    assert [info.id for info in batch.samples] == [sample.id for sample in samples]
    assert [(info.row, info.segment) for info in batch.samples] == [(row, 1) for row in range(7)]
    assert torch.equal(batch.position_ids, torch.arange(20).expand(7, 20))  # padding goes on counting


@pytest.mark.parametrize("capacity", [20, 23, 40, 1000])
def test_packed(capacity: int, samples: list[Sample]) -> None:
    batch = collate_packed(samples, capacity, pad_id=PAD)
    check(batch, samples)
    assert batch.input_ids.shape[1] <= capacity
    assert len(batch.input_ids) == len(bins_of([len(sample) for sample in samples], capacity))


def test_position_ids_restart_and_padding_continues_the_last_segment(make_sample: MakeSample) -> None:
    batch = collate_packed([make_sample(name, n) for name, n in (("a", 5), ("b", 3), ("c", 6))], 8, pad_id=PAD)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 2, 2, 2]]


def test_no_segment_predicts_the_start_of_the_next(make_sample: MakeSample) -> None:
    given = [make_sample(name, 4) for name in "abc"]
    for sample in given:
        sample.labels = list(sample.ids)  # supervised from the first id on, as a document is
    batch = collate_packed(given, 12, pad_id=PAD)
    assert batch.target_positions.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert batch.counts.supervised == sum(sample.num_supervised for sample in given) == 9


def test_packed_and_padded_hold_the_same_targets(samples: list[Sample]) -> None:
    padded, packed = collate(samples, pad_id=PAD), collate_packed(samples, 40, pad_id=PAD)
    assert sorted(padded.targets.tolist()) == sorted(packed.targets.tolist())
    assert padded.counts.visual_tokens == packed.counts.visual_tokens


def test_image_positions_follow_the_order_of_the_images(samples: list[Sample]) -> None:
    batch = collate_packed(samples, 40, pad_id=PAD)
    runs = batch.image_positions.split([grid.num_tokens for grid in batch.image_grids])
    expected = [
        row * batch.input_ids.shape[1] + place.start + start
        for sample, row, place in laid_out(batch, samples)
        for start in sample.image_starts
    ]
    assert [int(run[0]) for run in runs] == expected
    assert all(torch.equal(run, torch.arange(len(run)) + run[0]) for run in runs)
    pictures = [image for sample, _, _ in laid_out(batch, samples) for image in sample.images]
    parts = batch.images.pixels.split([3 * h * w for h, w in batch.images.sizes])
    assert all(torch.equal(part, picture.flatten()) for part, picture in zip(parts, pictures, strict=True))


def test_groups_give_every_image_back_once(samples: list[Sample]) -> None:
    batch = collate(samples, pad_id=PAD)
    pictures = [image for sample in samples for image in sample.images]
    seen = {}
    for indices, stacked in batch.images.groups():
        seen |= dict(zip(indices, stacked, strict=True))
    assert sorted(seen) == list(range(len(pictures)))
    assert all(torch.equal(seen[i], picture) for i, picture in enumerate(pictures))


def test_prompts_end_at_the_last_position(samples: list[Sample]) -> None:
    batch = collate_prompts(samples, pad_id=PAD)
    width = batch.input_ids.shape[1]
    for row, sample in enumerate(samples):
        start = width - len(sample)
        assert batch.input_ids[row].tolist() == [PAD] * start + sample.ids
        assert batch.position_ids[row].tolist() == [0] * start + list(range(len(sample)))
        assert batch.segment_ids[row].tolist() == [0] * start + [1] * len(sample)
        assert batch.labels[row, : start + 1].tolist() == [IGNORE] * (start + 1)
    flat = batch.input_ids.flatten()
    assert (flat[batch.image_positions] == 0).all()
    assert len(batch.image_positions) == int((flat == 0).sum())


@pytest.mark.parametrize("how", [collate, collate_prompts, lambda s, b, pad_id: collate_packed(s, 8, b, pad_id)])
def test_a_batch_of_bad_samples_is_one_row_of_padding(how: Any) -> None:
    bad = (BadSample("a", "made", "missing_image", "a.png"),)
    batch: Batch = how([], bad, pad_id=PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.segment_ids.tolist() == [[0]]
    assert batch.counts == (0, 0, 0, 0, 0, 1)
    assert batch.bad == bad
    assert (len(batch.images), len(batch.target_positions), len(batch.image_positions)) == (0, 0, 0)
    assert list(batch.images.groups()) == []
    assert batch.to(torch.device("cpu")).input_ids.tolist() == [[PAD]]


def test_teacher_images_follow_the_samples(make_sample: MakeSample) -> None:
    given = [make_sample("a", 5, [Grid(1, 2)]), make_sample("b", 9), make_sample("c", 9, [Grid(1, 1), Grid(2, 2)])]
    for sample in given:
        if sample.images:
            sample.teacher_images = {"depth": [image[:, :2, :2] for image in sample.images]}
    batch = collate_packed(given, 100, pad_id=PAD)
    order = [sample for sample, _, _ in laid_out(batch, given)]
    expected = torch.cat([image.flatten() for sample in order for image in sample.teacher_images.get("depth", [])])
    assert torch.equal(batch.teacher_images["depth"].pixels, expected)
    assert len(batch.teacher_images["depth"]) == len(batch.images) == 3


def test_notes_of_samples_are_reported_with_the_bad_ones(make_sample: MakeSample) -> None:
    note = BadSample("a", "made", "truncated", "9 positions", dropped=False)
    gone = BadSample("b", "made", "missing_image", "b.png")
    batch = collate([replace(make_sample("a", 4), note=note)], [gone], pad_id=PAD)
    assert set(batch.bad) == {note, gone}


# ----- encoding and truncation -----


def encoder(spec: InputSpec, max_length: int = 10_000, too_long: Any = "truncate", **options: Any) -> SampleEncoder:
    return SampleEncoder(spec, ChatML(), Native(64), max_length, too_long, **options)


@pytest.fixture
def record(png: Callable[..., bytes]) -> Record:
    pictures = [Image(data=png(12, 8)), Image(data=png(4, 4)), Image(data=png(8, 16))]
    messages = (
        Message("user", (pictures[0], Text("one"), pictures[1])),
        Message("assistant", (Text("first answer"),)),
        Message("user", (Text("and"), pictures[2])),
        Message("assistant", (Text("second"),)),
    )
    return Record("r", "made", messages)


def test_an_encoded_record(record: Record, bytes_spec: InputSpec) -> None:
    sample = encoder(bytes_spec)(record, Path("/nowhere"))
    assert sample.grids == [Grid(2, 3), Grid(1, 1), Grid(4, 2)]
    assert [tuple(image.shape) for image in sample.images] == [(3, 8, 12), (3, 4, 4), (3, 16, 8)]
    for start, grid in zip(sample.image_starts, sample.grids, strict=True):
        assert sample.ids[start : start + grid.num_tokens] == [0] * grid.num_tokens
        assert sample.labels[start : start + grid.num_tokens] == [IGNORE] * grid.num_tokens
    supervised = [label for label in sample.labels if label != IGNORE]
    assert bytes_spec.tokenizer.decode(supervised) == "first answer<|im_end|>second<|im_end|>"
    assert sample.note is None


def test_truncation_never_cuts_an_image(record: Record, bytes_spec: InputSpec) -> None:
    spec = replace(bytes_spec, teacher_pixels={"depth": PixelSpec(None, 4, (0.5, 0.5, 0.5))})
    whole = encoder(spec)(record, Path("/nowhere"))
    usable = 0
    for limit in range(1, len(whole) + 2):
        try:
            sample = encoder(spec, limit)(record, Path("/nowhere"))
        except RecordError as error:
            assert error.reason == "no_supervision"  # noqa: PT017 - either outcome is right
            assert not usable
            continue
        usable += 1
        assert len(sample) <= limit
        assert sample.ids == whole.ids[: len(sample)]
        assert sample.labels == whole.labels[: len(sample)]
        kept = len(sample.grids)
        assert sample.grids == whole.grids[:kept]
        assert sample.image_starts == whole.image_starts[:kept]
        assert len(sample.images) == len(sample.teacher_images["depth"]) == kept
        ends = [start + grid.num_tokens for start, grid in zip(whole.image_starts, whole.grids, strict=True)]
        assert all(end <= len(sample) for end in ends[:kept])
        assert all(start >= len(sample) for start in whole.image_starts[kept:])
        inside = next((start for start, end in zip(whole.image_starts, ends, strict=True) if start < limit < end), None)
        assert len(sample) == (min(limit, len(whole)) if inside is None else inside)
        assert (sample.note is None) == (limit >= len(whole))
        check(collate([sample], pad_id=PAD), [sample])
    assert usable > 20


def test_truncation_is_noted(record: Record, bytes_spec: InputSpec) -> None:
    whole = encoder(bytes_spec)(record, Path("/nowhere"))
    cut = whole.image_starts[2] + 3
    note = encoder(bytes_spec, cut)(record, Path("/nowhere")).note
    detail = f"{len(whole)} positions, max_length is {cut}; 1 of 3 images cut off"
    assert note == BadSample("r", "made", "truncated", detail, dropped=False)


def test_too_long_samples_can_be_dropped(record: Record, bytes_spec: InputSpec) -> None:
    length = len(encoder(bytes_spec)(record, Path("/nowhere")))
    assert len(encoder(bytes_spec, length, "drop")(record, Path("/nowhere"))) == length
    with pytest.raises(RecordError, match=f"too_long: {length} positions, max_length is {length - 1}"):
        encoder(bytes_spec, length - 1, "drop")(record, Path("/nowhere"))


def test_a_sample_without_supervision_is_refused(bytes_spec: InputSpec) -> None:
    silent = Record("r", "made", (Message("user", (Text("a"),)), Message("assistant", (Text("b", loss=False),))))
    with pytest.raises(RecordError, match="no_supervision"):
        encoder(bytes_spec)(silent, Path("/nowhere"))


def test_a_prompt_needs_no_supervision(record: Record, bytes_spec: InputSpec) -> None:
    sample = encoder(bytes_spec, prompt=True)(record, Path("/nowhere"))
    assert len(sample.images) == 3
    assert bytes_spec.tokenizer.decode(sample.ids[-20:]).endswith("<|im_start|>assistant\n")


def test_options_are_kept(bytes_spec: InputSpec) -> None:
    messages = (Message("user", (Text("a"),)), Message("assistant", (Text("b"),)))
    assert encoder(bytes_spec)(Record("r", "made", messages, ("b", "c")), Path("/nowhere")).options == ("b", "c")


def test_an_image_that_cannot_be_read_is_an_error_of_the_record(bytes_spec: InputSpec, tmp_path: Path) -> None:
    messages = (Message("user", (Image(path="a.png"),)), Message("assistant", (Text("b"),)))
    with pytest.raises(RecordError, match=r"missing_image: .*a\.png does not exist"):
        encoder(bytes_spec)(Record("r", "made", messages), tmp_path)
