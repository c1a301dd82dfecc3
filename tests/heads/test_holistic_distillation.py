"""What HoVLE's embedder is distilled towards."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lit_vlm.core.batch import Batch, Images
from lit_vlm.data.sample.collate import collate, make_rows
from lit_vlm.decoders import AbsentDecoder
from lit_vlm.encoders import HFEncoder
from lit_vlm.heads import HolisticDistillation, WordDistillation
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import HFVision
from lit_vlm.training.stage import Stage
from tests.embedders.test_holistic import model_of, samples_for

VIT = {"model_type": "internvl_vision", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
       "num_attention_heads": 2, "image_size": 28, "patch_size": 7}  # fmt: skip
TEACHER = partial(HFVision, None, VIT, -1)


def model_with(**heads: Any) -> VLM:
    """A tiny HoVLE with heads, in eval mode."""
    plain = model_of("hovle")
    made = {name: head(64, 3) for name, head in heads.items()}
    return VLM(plain.encoder, plain.projector, plain.embedder, plain.decoder, made).eval()


def batch_for(model: VLM, packed: bool = False) -> Batch:
    """Five samples, one without image, with the same images for the teacher."""
    samples = samples_for(model)
    for sample in samples:
        sample.teacher_images = {"image": sample.images} if sample.images else {}
    batch = make_rows([samples[:3], samples[3:]]) if packed else collate(samples)
    batch.teacher_images = {"image": batch.images}
    return batch


@pytest.mark.parametrize("packed", [False, True])
def test_the_text_term_compares_text_with_the_words_that_went_in(packed: bool) -> None:
    model = model_with(text=WordDistillation)
    batch = batch_for(model, packed)
    given = model.embed(batch).flatten(0, 1)
    words = model.embedder.words(batch.input_ids, model.decoder).flatten(0, 1)
    images = set(batch.image_positions.tolist())
    places = [i for i, s in enumerate(batch.segment_ids.flatten().tolist()) if s and i not in images]
    expected = sum(1 - F.cosine_similarity(given[i], words[i], dim=0) for i in places)
    assert len(places) == batch.counts.text_tokens
    torch.testing.assert_close(model(batch, {"text": 1.0})["text"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("match", ["merge", "pool"])
def test_the_image_term_compares_image_tokens_with_the_patches_below_them(match: str) -> None:
    model = model_with(image=partial(HolisticDistillation, teacher=TEACHER, ratio=2, match=match))
    batch = batch_for(model)
    head = model.heads["image"]
    student = head.predictor(model.embed(batch).flatten(0, 1)[batch.image_positions])
    teacher = head.teacher(batch.images)
    expected, token, start = torch.zeros(()), 0, 0
    for grid in teacher.grids:
        patches = teacher.features[start : start + grid.num_tokens].view(grid.rows, grid.cols, -1)
        for row in range(0, grid.rows, 2):
            for col in range(0, grid.cols, 2):
                four = torch.stack([patches[row + i, col + j] for i in (0, 1) for j in (0, 1)])
                target = four.flatten() if match == "merge" else four.mean(0)
                expected = expected + 1 - F.cosine_similarity(student[token], target, dim=0)
                token += 1
        start += grid.num_tokens
    assert token == len(student)
    torch.testing.assert_close(model(batch, {"image": 1.0})["image"], expected, rtol=1e-5, atol=1e-5)


def test_a_batch_without_images_uses_every_weight() -> None:
    model = model_with(image=partial(HolisticDistillation, teacher=TEACHER), text=WordDistillation)
    batch = collate(samples_for(model)[:1])
    sums = model(batch, {"image": 1.0, "text": 1.0})
    assert sums["image"] == 0
    (sums["image"] + sums["text"]).backward()
    trained = [*model.heads.named_parameters(), *model.encoder.named_parameters(), *model.projector.named_parameters()]
    assert all(parameter.grad is not None for _, parameter in trained)


def test_words_are_a_target_and_no_way_for_gradients() -> None:
    model = model_with(text=WordDistillation)
    model.embedder.stack.embed_tokens.weight.requires_grad_(False)  # type: ignore[union-attr]
    batch = batch_for(model)
    model(batch, {"text": 1.0})["text"].backward()
    assert all(p.grad is not None for block in model.embedder.blocks() for p in block.parameters())


def test_grids_that_do_not_fit_are_named() -> None:
    model = model_with(image=partial(HolisticDistillation, teacher=TEACHER, ratio=1))
    with pytest.raises(ValueError, match="with ratio 1 it must give"):
        model(batch_for(model), {"image": 1.0})
    with pytest.raises(ValueError, match="targets are 64 wide and the decoder is 32"):
        HolisticDistillation(32, 3, TEACHER, predictor="none")
    assert isinstance(HolisticDistillation(64, 3, TEACHER, predictor="none").predictor, torch.nn.Identity)


def test_the_decoder_need_not_be_there() -> None:
    model = model_with(image=partial(HolisticDistillation, teacher=TEACHER), text=WordDistillation)
    batch, losses = batch_for(model), {"image": 1.0, "text": 1.0}
    before = model(batch, losses)
    model.decoder = AbsentDecoder(model.decoder)
    stage = Stage(train={"embedder": 1e-3}, only={"embedder": "layers"}, losses=losses, leave_out=["decoder"])
    stage.freeze(model)
    assert not model.embedder.stack.embed_tokens.weight.requires_grad  # type: ignore[union-attr]
    after = model(batch, losses)
    assert all(torch.equal(before[name], after[name]) for name in losses)
    assert not [key for key in model.state_dict() if key.startswith("decoder")]
    with pytest.raises(ValueError, match="the decoder is left out of this stage"):
        model.logits(batch)
    with pytest.raises(ValueError, match="which these losses run: next_token"):
        Stage(train={"embedder": 1e-3}, leave_out=["decoder"]).freeze(model)


def test_the_teacher_sees_the_same_tiles() -> None:
    teacher = HFEncoder(config=VIT, layer=-1).eval()
    tiles = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    column = torch.cat(list(tiles), dim=1)
    torch.testing.assert_close(teacher(Images.pack([column])).features, teacher(Images.pack(list(tiles))).features)
