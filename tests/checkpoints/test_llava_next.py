"""LLaVA-NeXT against transformers' own: preprocessing, token counts, logits and gradients on random weights."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published import export_published
from lit_vlm.core.batch import Batch, Grid, Images, PixelSpec
from lit_vlm.core.tiling import Tiling
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data import AnyRes, ChatML
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sample.collate import collate, collate_prompts, make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.embedders import SpliceTiles
from lit_vlm.encoders.base import CLIP_MEAN, PatchGrid
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Downsample, Resampler
from lit_vlm.projectors.base import same_grid
from lit_vlm.worlds import Shapes
from tests.tiny import CLIP, LLAMA, batch_of, tiny_vlm

SIDE = CLIP["image_size"]
IMAGE = 299
TRANSFORM = AnyRes(tile=SIDE)
PINPOINTS = [[rows * SIDE, columns * SIDE] for columns, rows in TRANSFORM.layouts]
CONFIG = {
    "vision_config": CLIP | {"projection_dim": 16},
    "text_config": LLAMA | {"vocab_size": 300},
    "image_token_index": IMAGE,
    "image_grid_pinpoints": PINPOINTS,
}
SIZES = [(40, 30), (50, 24), (25, 55), (300, 20), (20, 100)]
"""(width, height) of pictures: one for each layout."""


@pytest.fixture(scope="module")
def twin() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    twin = LlavaNextForConditionalGeneration(LlavaNextConfig(**CONFIG)).eval()
    twin.set_attn_implementation("sdpa")
    return twin


@pytest.fixture
def model(twin: LlavaNextForConditionalGeneration) -> VLM:
    return load_published("llava_next", twin.state_dict(), CONFIG)


def picture(size: tuple[int, int], seed: int = 0) -> PILImage.Image:
    """A picture of smooth colours, so that resampling has something to keep."""
    rng = np.random.default_rng(seed)
    small = PILImage.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize(size, PILImage.Resampling.BICUBIC)


def layouts_of(model: VLM) -> InputSpec:
    """What the data side must know of a model, but for its tokenizer."""
    embedder = model.embedder
    return InputSpec(None, model.encoder.pixels, model.encoder.patch_grid, model.grid_map, tile_map=embedder.tile_map)


def sample_of(model: VLM, number: int, sizes: list[tuple[int, int]]) -> Sample:
    """Text, then each picture, with text behind it."""
    rng = np.random.default_rng(number)
    spec, sample = layouts_of(model), Sample(str(number), "", [1, 2], [-100, -100])
    for index, size in enumerate(sizes):
        pixels = TRANSFORM(picture(size, 10 * number + index), spec.pixels)
        tiling = TRANSFORM.tiling(size)
        grid = spec.grid(pixels.shape[1], pixels.shape[2], tiling)
        sample.image_starts.append(len(sample.ids))
        sample.images.append(pixels)
        sample.grids.append(grid)
        sample.tilings.append(tiling)
        text = rng.integers(0, 290, 5 + number).tolist()
        sample.ids += [0] * grid.num_tokens + text
        sample.labels += [-100] * grid.num_tokens + text
    return sample


def samples_of(model: VLM) -> list[Sample]:
    text = Sample("text", "", list(range(9)), [-100, *range(1, 9)])
    return [sample_of(model, number, [size]) for number, size in enumerate(SIZES)] + [
        sample_of(model, len(SIZES), SIZES[:2]),
        text,
    ]


def inputs_of(model: VLM, sample: Sample) -> dict[str, Tensor]:
    """The same pixels and ids for transformers."""
    ids = torch.tensor(sample.ids)
    for start, grid in zip(sample.image_starts, sample.grids, strict=True):
        ids[start : start + grid.num_tokens] = IMAGE
    inputs = {"input_ids": ids[None], "labels": torch.tensor(sample.labels)[None]}
    if sample.images:
        cut = [one.unflatten(1, (-1, SIDE)).transpose(0, 1) for one in sample.images]
        tiles = [model.encoder.normalise(one, torch.float32) for one in cut]
        most = max(len(one) for one in tiles)
        padded = [torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in tiles]
        sizes = [(one.height, one.width) for one in sample.tilings if one is not None]
        inputs |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
    return inputs


def own_gradients(model: VLM, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch, {"next_token": 1.0})["next_token"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def their_gradients(twin: LlavaNextForConditionalGeneration, model: VLM, samples: list[Sample]) -> dict[str, Tensor]:
    """Gradients of the summed loss of all samples, under the kit's names."""
    twin.zero_grad()
    for sample in samples:
        inputs = inputs_of(model, sample)
        supervised = (inputs["labels"][:, 1:] != -100).sum()
        (twin(**inputs).loss * supervised).backward()
    found = {key: p.grad.clone() for key, p in twin.named_parameters() if p.grad is not None}
    read = load_published("llava_next", twin.state_dict() | found, CONFIG)
    return dict(read.named_parameters())


def test_logits_equal_those_of_transformers_padded_and_packed(twin, model) -> None:
    samples = samples_of(model)
    padded, packed = collate(samples), make_rows([samples])
    assert {(one.cols, one.rows) for one in padded.tilings if one} == {tuple(pair) for pair in TRANSFORM.layouts}
    with torch.no_grad():
        rows, row = model.logits(padded), model.logits(packed)[0]
        start = 0
        for index, sample in enumerate(samples):
            expected = twin(**inputs_of(model, sample)).logits[0]
            torch.testing.assert_close(rows[index, : len(sample)], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(row[start : start + len(sample)], expected, atol=1e-5, rtol=1e-5)
            start += len(sample)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_of_transformers(twin, model, packed: bool) -> None:
    samples = samples_of(model)
    own = own_gradients(model, make_rows([samples]) if packed else collate(samples))
    theirs = their_gradients(twin, model, samples)
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, theirs[name].detach(), atol=1e-5, rtol=1e-4, msg=name)
    assert own["embedder.newline"].abs().max() > 1e-3


def test_pixels_and_layout_are_those_of_the_image_processor(model) -> None:
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    rng = np.random.default_rng(1)
    worst, summed, seen = 0, 0.0, set()
    sizes = [tuple(size) for size in rng.integers(1, 200, (200, 2)).tolist()]
    for number, size in enumerate(sizes):
        image = picture(size, number)
        found = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        own = TRANSFORM(image, model.encoder.pixels)
        tiles, tiling = own.unflatten(1, (-1, SIDE)).transpose(0, 1), TRANSFORM.tiling(size)
        assert tuple(found["image_sizes"][0].tolist()) == (tiling.height, tiling.width)
        theirs = found["pixel_values"][0]
        assert tuple(theirs.shape) == tuple(tiles.shape)
        expected = select_best_resolution(size[::-1], PINPOINTS)
        assert (tiling.rows * SIDE, tiling.cols * SIDE) == expected
        difference = (theirs.float() - tiles.float()).abs()
        worst, summed = max(worst, int(difference.max())), max(summed, float(difference.mean()))
        seen.add((tiling.cols, tiling.rows))
    assert len(seen) == 5
    assert worst <= 1
    assert summed <= 0.01


@pytest.mark.parametrize(("side", "patch"), [(336, 14), (28, 7)])
def test_numbers_of_tokens_are_those_of_the_processor(side: int, patch: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"])
    transform = AnyRes(tile=side)
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in transform.layouts],
        ),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    spec = InputSpec(
        None, PixelSpec(side, patch, CLIP_MEAN), PatchGrid(patch), same_grid, tile_map=SpliceTiles(8, 8).tile_map
    )
    encode = SampleEncoder(spec, ChatML(), transform, 10_000)
    sizes = [*np.random.default_rng(2).integers(1, 3000, (250, 2)).tolist(), [1, 3000], [3000, 1], [672, 336]]
    found = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
    assert [encode.tokens_of((width, height)) for width, height in sizes] == found.num_image_tokens
    assert len(set(found.num_image_tokens)) > 30 or side == 28
    if side == 336:  # all patches of four tiles and the copy, and a newline behind each of 48 rows
        assert encode.tokens_of((1000, 1000)) == 576 + 48 * 49


def test_a_fold_stays_inside_a_tile(model) -> None:
    """Each folded token is of one tile, so a picture gives what its tiles give one by one, put together."""
    folded = tiny_vlm(embedder=SpliceTiles, projector=Downsample)
    sample = sample_of(folded, 0, [(96, 64)])
    grid, tiling = sample.grids[0], sample.tilings[0]
    assert tiling is not None
    assert (tiling.rows, tiling.cols) == (2, 2)
    assert grid == Grid(4, 4, prefix=4, row_end=1)._replace(rows=tiling.patches(2)[0])
    batch = collate([sample])
    with torch.no_grad():
        embeds = folded.embed(batch)[0, 2 : 2 + grid.num_tokens]
        tiles = sample.images[0].unflatten(1, (-1, SIDE)).transpose(0, 1)
        alone = [folded.projector(folded.encoder(Images.pack([tile]))).features.view(2, 2, -1) for tile in tiles]
    whole = torch.cat([torch.cat(alone[1:3], dim=1), torch.cat(alone[3:5], dim=1)])
    top = (4 - grid.rows) // 2
    rows = torch.cat([whole[top : top + grid.rows], folded.embedder.newline.expand(grid.rows, 1, -1)], dim=1)
    torch.testing.assert_close(embeds, torch.cat([alone[0].flatten(0, 1), rows.flatten(0, 1)]), atol=1e-5, rtol=1e-5)


def test_tokens_that_are_no_rows_of_tiles_are_refused(model) -> None:
    for projector in (partial(Downsample, token_order="col"), partial(Resampler, num_queries=4, head_dim=16)):
        other = tiny_vlm(embedder=SpliceTiles, projector=projector)
        with pytest.raises(ValueError, match="keeps patches in rows|keeps each patch"):
            sample_of(other, 0, [(40, 30)])


def test_what_no_tiles_are_made_of_stays_as_it_is() -> None:
    """Without tiles the embedder is Splice, and its vector has a gradient of zero."""
    tiled, plain = tiny_vlm(embedder=SpliceTiles), tiny_vlm()
    for batch in (batch_of(tiled), collate([Sample("text", "", [1, 2, 3], [-100, 2, 3])])):
        torch.testing.assert_close(tiled.logits(batch), plain.logits(batch), atol=0, rtol=0)
        assert not own_gradients(tiled, batch)["embedder.newline"].any()


def test_a_picture_that_is_cut_off_takes_its_tiling_along(model) -> None:
    def asked(size: tuple[int, int]) -> tuple[Message, Message]:
        buffer = io.BytesIO()
        picture(size).save(buffer, "PNG")
        return Message("user", (Image(data=buffer.getvalue()), Text("What?"))), Message("assistant", (Text("This."),))

    record = Record("a", "a", (*asked((50, 24)), *asked((40, 30))))
    spec = replace(layouts_of(model), tokenizer=byte_tokenizer())
    whole = SampleEncoder(spec, ChatML(), TRANSFORM, 1000)(record, Path())
    assert whole.tilings == [Tiling(1, 2, 24, 50), Tiling(2, 2, 30, 40)]
    assert SampleEncoder(spec, ChatML(), TRANSFORM, 1000).measure(record, Shapes(1)) == (len(whole), 2)
    cut = SampleEncoder(spec, ChatML(), TRANSFORM, whole.image_starts[1] + 10)(record, Path())
    assert cut.note is not None
    assert cut.tilings == whole.tilings[:1]
    assert len(cut.grids) == 1
    batch = collate([cut, whole])
    assert batch.tilings == (whole.tilings[0], *whole.tilings)
    assert torch.isfinite(model.logits(batch)).all()


def test_answers_go_on_from_tiles(twin, model) -> None:
    """Greedy answers to prompts with pictures of different layouts are transformers' own."""
    samples = [sample_of(model, number, [size]) for number, size in enumerate(SIZES[:3])]
    answers = generate(model, collate_prompts(samples), max_new_tokens=4, stop_ids=frozenset())
    for sample, answer in zip(samples, answers, strict=True):
        inputs = inputs_of(model, sample)
        inputs.pop("labels")
        mask = torch.ones_like(inputs["input_ids"])
        expected = twin.generate(**inputs, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert list(answer) == expected[0, len(sample) :].tolist()


def test_a_published_folder_is_read_and_not_written(twin, model, tmp_path) -> None:
    twin.save_pretrained(tmp_path / "published")
    slots = read_slots(f"llava_next:{tmp_path / 'published'}")
    assert torch.equal(slots["embedder"]["newline"], twin.model.image_newline)
    found = {f"{slot}.{key}": value for slot, state in slots.items() for key, value in state.items()}
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="the family llava_next is one to start from .* it writes nothing"):
        export_published("llava_next", model, tmp_path / "out", None)
    with pytest.raises(ValueError, match="this model is HFEncoder, MLP, SpliceTiles, HFDecoder"):
        export_published("llava-hf", tiny_vlm(embedder=SpliceTiles), tmp_path / "out", None)


def test_what_is_not_read_is_refused(twin) -> None:
    state = twin.state_dict()
    with pytest.raises(ValueError, match=r"slot 'embedder' \(SpliceTiles\): missing: newline \(model.image_newline\)"):
        load_published("llava_next", {k: v for k, v in state.items() if k != "model.image_newline"}, CONFIG)
    with pytest.raises(ValueError, match="vision_feature_select_strategy 'full': tiles with a CLS token"):
        load_published("llava_next", state, CONFIG | {"vision_feature_select_strategy": "full"})
    with pytest.raises(ValueError, match="'model.other' is no key of the family llava_next"):
        load_published("llava_next", state | {"model.other": torch.zeros(1)}, CONFIG)
    with pytest.raises(ValueError, match="model_type 'llava_next', which is the family llava_next"):
        load_published("llava-hf", state, CONFIG | {"model_type": "llava_next"})
    with pytest.raises(ValueError, match="give pairs .columns, rows. of tiles"):
        AnyRes([[1, 0]])
