"""Task tokens: where they are, what they hold, and that decoding sees them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from lit_vlm.core.batch import Batch, Grid, index_patches, index_suffixes
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.encode import Sample
from lit_vlm.embedders import Splice
from lit_vlm.encoders import LinearPatches
from lit_vlm.heads import FeatureDistillation
from lit_vlm.model.build import build
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity
from lit_vlm.teachers import HFVision
from lit_vlm.testing.tiny import samples_for
from tests.heads.test_embedding_distillation import PACKED, PADDED, batch_with
from tests.tiny import CLIP, tiny_slots, tiny_vlm

TASKS = partial(Splice, task_tokens={"seg": 1, "depth": 2}, pooled_from={"depth": 6})


def model_with_tasks() -> VLM:
    """A tiny model whose images are followed by three task tokens."""
    return tiny_vlm(embedder=TASKS)


@pytest.mark.parametrize("shapes", [PADDED, PACKED], ids=["padded", "packed"])
def test_every_image_is_followed_by_its_task_tokens_in_order(shapes: list[list[list[int]]]) -> None:
    model = model_with_tasks()
    batch = batch_with(model, shapes)
    embeds = model.embed(batch).flatten(0, 1)
    seg, depth = model.embedder.task_parameters("seg"), model.embedder.task_parameters("depth")
    expected = torch.cat([seg, torch.stack([depth[:3].mean(0), depth[3:].mean(0)])])
    visual = model.see(batch)
    lengths = [grid.num_tokens for grid in batch.image_grids]
    assert lengths == [19] * 4
    for positions, features in zip(batch.image_positions.split(lengths), visual.features.split(16), strict=True):
        torch.testing.assert_close(embeds[positions[:16]], features)
        torch.testing.assert_close(embeds[positions[16:]], expected)
    words = model.decoder.embed(batch.input_ids).flatten(0, 1)
    text = [i for i in range(len(words)) if i not in set(batch.image_positions.tolist())]
    torch.testing.assert_close(embeds[text], words[text])


def test_generation_with_a_cache_continues_as_the_whole_sequence_would() -> None:
    model = model_with_tasks()
    samples = [
        Sample("", "", row.ids, row.ids, row.image_starts, row.grids, row.images)
        for row in (_sample(model, [3, 4]), _sample(model, [2, 1, 7]), _sample(model, [5]))
    ]
    rows = generate(model, collate_prompts(samples), stop_ids=[-1], max_new_tokens=4)
    for sample, row in zip(samples, rows, strict=True):
        ids = list(sample.ids)
        for token in row:
            given = Sample("", "", ids, ids, sample.image_starts, sample.grids, sample.images)
            assert int(model.logits(collate([given]))[0, -1].argmax()) == token
            ids.append(token)


def _sample(model: VLM, lengths: list[int]) -> Sample:
    batch: Batch = batch_with(model, [[lengths]])
    count = len(lengths) - 1
    pixels = list(batch.images.pixels.view(count, 3, 28, 28)) if count else []
    starts = batch.image_positions.view(count, -1)[:, 0].tolist() if count else []
    return Sample(
        "", "", batch.input_ids[0].tolist(), batch.input_ids[0].tolist(), starts, list(batch.image_grids), pixels
    )


def test_only_task_tokens_are_weights_of_the_embedder() -> None:
    with_tasks, without = model_with_tasks(), tiny_vlm()
    assert set(with_tasks.embedder.state_dict()) == {"tasks.seg", "tasks.depth"}
    assert not without.embedder.state_dict()


def test_the_start_of_task_tokens_has_the_standard_deviation_that_was_asked_for() -> None:
    splice = Splice(512, 10, {"a": 64}, token_std=0.02)
    assert splice.task_parameters("a").std().item() == pytest.approx(0.02, rel=0.05)
    assert Splice(512, 10, {"a": 64}).task_parameters("a").std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_tokens": {"a": 0}}, "task_tokens.a is 0: leave a group without tokens out"),
        ({"task_tokens": {"a": 4}, "pooled_from": {"a": 6}}, "pooled_from.a 6 is no multiple of its 4 task_tokens"),
        ({"pooled_from": {"a": 6}}, "pooled_from names \\['a'\\], of which task_tokens has none"),
    ],
)
def test_numbers_that_do_not_fit_say_so(arguments: dict[str, dict[str, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Splice(8, 10, **arguments)


def test_other_heads_take_no_task_token_for_a_patch() -> None:
    teacher = partial(HFVision, None, CLIP, -2)
    heads = {"feature": partial(FeatureDistillation, teacher=teacher)}
    losses = []
    for embedder in (Splice, TASKS):
        model = build(tiny_slots(embedder=embedder, heads=heads)).eval()
        batch = batch_with(model, PADDED)
        batch.teacher_images = {"feature": batch.images}
        losses.append(model(batch, {"feature": 1.0})["feature"])
    assert all(loss.isfinite() for loss in losses)
    # Causal attention: patches of a first image come before any task token, so they are read as without them.
    model = build(tiny_slots(embedder=TASKS, heads=heads)).eval()
    plain = build(tiny_slots(heads=heads)).eval()
    single = []
    for one in (model, plain):
        batch = batch_with(one, [[[3, 4]]])
        batch.teacher_images = {"feature": batch.images}
        single.append(one(batch, {"feature": 1.0})["feature"])
    torch.testing.assert_close(single[0], single[1])


def test_suffixes_are_found_behind_patches_of_any_layout() -> None:
    grids = [Grid(2, 2, 1, 1, 3), Grid(1, 3, suffix=3)]
    others, suffixes = index_suffixes(grids)
    assert others.tolist() == [*range(7), 10, 11, 12]
    assert suffixes.tolist() == [[7, 8, 9], [13, 14, 15]]
    assert index_patches(grids).position.tolist() == [1, 2, 4, 5, 10, 11, 12]
    with pytest.raises(ValueError, match="images of one batch have \\[0, 3\\] tokens after their patches"):
        index_suffixes([Grid(1, 1), Grid(1, 1, suffix=3)])


def test_a_group_pooled_from_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="pooled_from.a 0 is no multiple"):
        Splice(8, 16, {"a": 2}, {"a": 0})


SIZES = [(14, 7), (7, 21), (14, 14)]
"""(height, width) in pixels of pictures of 2 × 1, 1 × 3 and 2 × 2 patches."""
CLOSED = {
    "encoder": partial(LinearPatches, width=64, patch=7, row_end=False),
    "projector": Identity,
    "embedder": partial(Splice, row_end="<|im_end|>"),
}


def _closed(row_end: str | int, tasks: dict[str, int] | None = None) -> VLM:
    return tiny_vlm(**CLOSED | {"embedder": partial(Splice, row_end=row_end, task_tokens=tasks)})


@pytest.mark.parametrize("tasks", [None, {"a": 2}], ids=["alone", "with task tokens"])
def test_the_vector_of_a_word_closes_each_row(tasks: dict[str, int] | None) -> None:
    model = _closed("<|im_end|>", tasks)
    seen, text = samples_for(model, SIZES)
    batch = collate([*seen, *text])
    assert batch.image_grids == tuple(Grid(h // 7, w // 7, row_end=1, suffix=2 if tasks else 0) for h, w in SIZES)
    embeds = model.embed(batch).flatten(0, 1)
    end = model.decoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    word = model.decoder.embed(torch.tensor(end))
    patches = model.see(batch).features.split([h // 7 * (w // 7) for h, w in SIZES])
    places = batch.image_positions.split([grid.num_tokens for grid in batch.image_grids])
    for grid, place, own in zip(batch.image_grids, places, patches, strict=True):
        rows = embeds[place[: grid.rows * (grid.cols + 1)]].view(grid.rows, grid.cols + 1, -1)
        assert torch.equal(rows[:, :-1].flatten(0, 1), own)
        assert torch.equal(rows[:, -1], word.expand(grid.rows, -1))
        if tasks:
            assert torch.equal(embeds[place[-2:]], model.embedder.task_parameters("a"))
    assert torch.equal(_closed(end, tasks).embed(batch).flatten(0, 1), embeds)


def test_an_export_has_the_id_of_the_token_that_closes_rows() -> None:
    model = _closed("<|im_end|>")
    assert model.embedder.standalone({"row_end": "<|im_end|>"}) == {"row_end": 2}
    assert Splice(4, 9).standalone({"token_std": 1.0}) == {"token_std": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedder": partial(Splice, row_end="|NEWLINE|")}, r"tokenizer \(bytes\) has no .*new_tokens '\[\"\|NEWLINE"),
        ({"embedder": partial(Splice, row_end=259)}, "row_end is 259, and the decoder's word table has 259 rows"),
    ],
    ids=["letters", "id"],
)  # fmt: skip
def test_a_row_end_that_the_decoder_lacks_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_vlm(**CLOSED | changes)


def test_rows_that_the_encoder_closes_are_not_closed_again() -> None:
    model = tiny_vlm(**CLOSED | {"encoder": partial(LinearPatches, width=64, patch=7)})
    with pytest.raises(ValueError, match="set the encoder's row_end to false, or the embedder's to null"):
        model.grid_map(model.encoder.patch_grid(14, 14))
