from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lit_vlm import projectors
from lit_vlm.checkpoints import load_published
from lit_vlm.core.batch import Images
from lit_vlm.core.lora import merge_adapters, trained_parameters
from lit_vlm.data import ChatML, Native, Plain, SquareCrop, Template
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.decoders import HFDecoder, Lora
from lit_vlm.encoders import Ensemble, HFEncoder, LinearPatches, TimmEncoder
from lit_vlm.heads import FeatureDistillation
from lit_vlm.model.generate import Continuation, generate, score_continuations
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import PerEncoder
from lit_vlm.teachers import EncoderTeacher
from lit_vlm.worlds import Shapes
from tests.tiny import (
    CLIP,
    LLAMA,
    batch_of,
    collate_packed,
    gradients,
    samples_of,
    spec_of,
    tiny_decoder,
    tiny_slots,
    tiny_vlm,
)

NEXT_TOKEN = {"next_token": 1.0}
PROJECTORS = [name for name in projectors.__all__ if name not in ("Identity", "Projector", "PerceiverLayer")]


@pytest.fixture(scope="module")
def model() -> VLM:
    return tiny_vlm()


@pytest.fixture
def pair() -> tuple[VLM, LlavaForConditionalGeneration]:
    config = {
        "vision_config": CLIP | {"projection_dim": 16},
        "text_config": LLAMA | {"vocab_size": 260},
        "image_token_index": 259,
        "image_seq_length": 16,
    }
    torch.manual_seed(0)
    reference = LlavaForConditionalGeneration(LlavaConfig(**config)).eval()
    ours = load_published("llava-hf", reference.state_dict(), config)
    ours.decoder.tokenizer_source = "bytes"
    return ours, reference


def reference_inputs(ours: VLM, batch) -> dict[str, torch.Tensor]:
    ids = batch.input_ids.clone()
    ids.view(-1)[batch.image_positions] = 259
    side = ours.encoder.pixels.size
    pixels = ours.encoder.normalise(batch.images.pixels.view(-1, 3, side, side), torch.float32)
    return {
        "input_ids": ids,
        "attention_mask": (batch.segment_ids > 0).long(),
        "pixel_values": pixels,
        "labels": batch.labels,
    }


@pytest.mark.parametrize("text_only", [False, True])
def test_logits_loss_and_gradients_equal_transformers_llava(pair, text_only: bool) -> None:
    ours, reference = pair
    batch = batch_of(ours, text_only=text_only)
    inputs = reference_inputs(ours, batch)
    output = reference(**inputs)
    valid = batch.segment_ids > 0
    torch.testing.assert_close(ours.logits(batch)[valid], output.logits[valid], atol=1e-5, rtol=1e-5)
    loss = ours(batch, NEXT_TOKEN)["next_token"] / len(batch.targets)
    torch.testing.assert_close(loss, output.loss, atol=1e-5, rtol=1e-4)
    ours.requires_grad_(True)
    ours.zero_grad()
    (ours(batch, NEXT_TOKEN)["next_token"] / len(batch.targets)).backward()
    output.loss.backward()
    expected = {
        "projector.layers.0.weight": reference.model.multi_modal_projector.linear_1.weight,
        "projector.layers.2.bias": reference.model.multi_modal_projector.linear_2.bias,
        "decoder.lm.lm_head.weight": reference.lm_head.weight,
        "decoder.lm.model.embed_tokens.weight": reference.model.language_model.embed_tokens.weight,
        "decoder.lm.model.layers.1.mlp.up_proj.weight": reference.model.language_model.layers[1].mlp.up_proj.weight,
        "encoder.backbone.encoder.layers.0.mlp.fc1.weight": reference.model.vision_tower.encoder.layers[
            0
        ].mlp.fc1.weight,
    }
    found = gradients(ours)
    for name, parameter in expected.items():
        wanted = parameter.grad
        if name == "decoder.lm.model.embed_tokens.weight":
            # The reference looks up the word of <image> and throws it away, so both leave its row without gradient;
            # ours looks up id 0 there.
            torch.testing.assert_close(found[name][1:259], wanted[1:259], atol=1e-6, rtol=1e-4)
        else:
            torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_unpacked_per_sample(attention: str) -> None:
    model = tiny_vlm(decoder=partial(HFDecoder, config=LLAMA, tokenizer="bytes", attention=attention))
    samples = samples_of(model, count=7)
    packed = collate_packed(samples, capacity=128)
    assert packed.input_ids.shape[0] < len(samples)
    by_id = per_sample(model, packed)
    for sample in samples:
        alone = per_sample(model, collate([sample]))[sample.id]
        torch.testing.assert_close(by_id[sample.id], alone, atol=1e-5, rtol=1e-5)
    model.requires_grad_(True)
    model(packed, NEXT_TOKEN)["next_token"].backward()
    together = gradients(model)
    model.zero_grad()
    for sample in samples:
        model(collate([sample]), NEXT_TOKEN)["next_token"].backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def per_sample(model: VLM, batch) -> dict[str, torch.Tensor]:
    counts = [sample.num_supervised for sample in batch.samples]
    return {sample.id: nll for sample, nll in zip(batch.samples, model.target_nll(batch).split(counts), strict=True)}


def test_flash_attention_path_joins_rows_without_mixing_them(model: VLM) -> None:
    # The kernel needs a GPU; what it is given does not.
    batch = batch_of(model, packed=True)
    embeds = model.embed(batch)
    expected = model.decoder(embeds, batch.position_ids, taps=(1, 3))
    model.decoder.attention = "flash_attention_2"
    try:
        joined = model.decoder(embeds, batch.position_ids, taps=(1, 3))
    finally:
        model.decoder.attention = "sdpa"
    valid = batch.segment_ids > 0
    torch.testing.assert_close(joined.hidden[valid], expected.hidden[valid], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined.taps[1][valid], expected.taps[1][valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_taps_are_the_hidden_states_of_transformers(lora: Lora | None) -> None:
    model = tiny_vlm(decoder=tiny_decoder(lora))
    batch = batch_of(model)
    embeds = model.embed(batch)
    output = model.decoder(embeds, batch.position_ids, taps=(0, 1, 2, 3))
    assert not any(block._forward_hooks for block in model.decoder.blocks())
    reference = model.decoder.base(
        inputs_embeds=embeds, position_ids=batch.position_ids, output_hidden_states=True, use_cache=False
    )
    for layer, state in output.taps.items():
        torch.testing.assert_close(state, reference.hidden_states[layer])
    with pytest.raises(ValueError, match="taps layer 4; this decoder has layers 0 to 3"):
        model.decoder(embeds, batch.position_ids, taps=(4,))


def test_recomputed_blocks_give_the_same_gradients_frozen_or_not() -> None:
    found = []
    for recompute in (False, True):
        model = tiny_vlm(decoder=partial(HFDecoder, config=LLAMA, tokenizer="bytes", recompute=recompute))
        model.requires_grad_(False)
        model.projector.requires_grad_(True)
        model.train()
        assert model.decoder.blocks()[0].training is recompute
        assert not model.decoder.blocks()[0].mlp.training
        model(batch_of(model), NEXT_TOKEN)["next_token"].backward()
        found.append(gradients(model))
        assert not model.eval().decoder.blocks()[0].training
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_projector_trains_in_a_model(name: str) -> None:
    slots: dict[str, Any] = {"projector": getattr(projectors, name)}
    if name == "PerEncoder":
        clip = partial(HFEncoder, config=CLIP)
        slots = {
            "encoder": partial(Ensemble, [clip, clip], "tokens", 4),
            "projector": partial(PerEncoder, widths=[32, 32]),
        }
    model = tiny_vlm(**slots)
    model.requires_grad_(True)
    batch = batch_of(model)
    model(batch, NEXT_TOKEN)["next_token"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.projector.parameters())


@pytest.mark.parametrize(
    "encoder",
    [
        partial(LinearPatches, width=64, patch=7),
        partial(TimmEncoder, "resnet10t", pretrained=None, image_size=64),
        partial(TimmEncoder, "vit_tiny_patch16_224", pretrained=None, depth=1, image_size=32),
    ],
)
def test_every_encoder_runs_in_a_model(encoder) -> None:
    model = tiny_vlm(encoder=encoder)
    source, transform = Shapes(6), Native(longest=56) if model.encoder.pixels.size is None else SquareCrop()
    encode = SampleEncoder(spec_of(model), ChatML(), transform, max_length=512)
    batch = collate([encode(source.record(index), source.image_folder) for index in range(len(source))])
    assert len(batch.images) == 4
    assert model(batch, NEXT_TOKEN)["next_token"].isfinite()


def test_a_batch_without_images_still_reaches_encoder_and_projector(model: VLM) -> None:
    samples = [sample for sample in samples_of(model, 6) if not sample.images]
    batch = collate(samples)
    assert len(batch.images) == 0
    model.requires_grad_(True)
    model.zero_grad()
    model(batch, NEXT_TOKEN)["next_token"].backward()
    for part in (model.encoder, model.projector):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
    model.requires_grad_(False)


def test_the_head_learns_from_its_teacher_and_skips_its_work_at_weight_0() -> None:
    calls = []

    class Counting(EncoderTeacher):
        def __call__(self, images: Images):
            calls.append(len(images))
            return super().__call__(images)

    teacher = partial(Counting, encoder=tiny_slots().encoder)
    model = tiny_vlm(heads={"distil": partial(FeatureDistillation, teacher=teacher, layer=2)})
    assert not any("teacher" in name for name, _ in model.named_parameters())
    batch = batch_of(model)
    batch.teacher_images["distil"] = batch.images
    model.requires_grad_(True)
    sums = model(batch, {"next_token": 0.0, "distil": 1.0})
    assert set(sums) == {"distil"}
    assert 0 < float(sums["distil"].detach()) / len(batch.images) <= 2
    sums["distil"].backward()
    found = gradients(model)
    assert found["decoder.lm.model.layers.1.mlp.up_proj.weight"].any()
    assert "decoder.lm.lm_head.weight" not in found
    assert calls == [len(batch.images)]
    model(batch, {"next_token": 1.0, "distil": 0.0})
    assert calls == [len(batch.images)]


def test_greedy_text_is_the_same_alone_and_in_a_batch(model: VLM) -> None:
    prompts = samples_of(model, 5, prompt=True)
    assert len({len(prompt) for prompt in prompts}) > 1
    stop = {2}
    together = generate(model, collate_prompts(prompts), stop, max_new_tokens=12)
    alone = [generate(model, collate_prompts([prompt]), stop, max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone
    assert any(together)


def test_cached_generation_equals_running_the_whole_sequence_again(model: VLM) -> None:
    (prompt,) = samples_of(model, 1, prompt=True)
    (tokens,) = generate(model, collate_prompts([prompt]), {2}, max_new_tokens=8)
    for index in range(len(tokens)):
        grown = type(prompt)(
            "x", "x", prompt.ids + tokens[:index], prompt.labels + tokens[:index],
            prompt.image_starts, prompt.grids, prompt.images,
        )  # fmt: skip
        assert int(model.logits(collate([grown]))[0, -1].argmax()) == tokens[index]


@pytest.mark.parametrize("template", [ChatML(), Plain()], ids=["chatml", "plain: the image ends the prompt"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_of_answers_that_share_a_prompt_equal_those_of_whole_sequences(
    model: VLM, batch_size: int, template: Template
) -> None:
    source = Shapes(5, text_only=False)
    encode = SampleEncoder(spec_of(model), template, SquareCrop(), max_length=256)
    samples = [encode(source.record(index), source.image_folder) for index in range(5)]
    starts = [next(i for i, label in enumerate(sample.labels) if label != -100) for sample in samples]
    prefixes = [
        replace(sample, ids=sample.ids[:start], labels=sample.labels[:start])
        for sample, start in zip(samples, starts, strict=True)
    ]
    endings = [sample.ids[start:] for sample, start in zip(samples, starts, strict=True)]
    asked = [Continuation(row, endings[other], endings[other]) for row in range(5) for other in (row, 4 - row)]
    whole = [
        replace(
            samples[one.row],
            ids=prefixes[one.row].ids + list(one.ids),
            labels=[-100] * len(prefixes[one.row]) + list(one.labels),
        )
        for one in asked
    ]
    scores = score_continuations(model, collate_prompts(prefixes), asked, batch_size)
    expected = [float(model.target_nll(collate([sample])).sum()) for sample in whole]
    assert scores == pytest.approx(expected, rel=1e-5)
    assert len({round(score, 3) for score in scores}) > 5


def test_sampling_depends_on_the_seed_only(model: VLM) -> None:
    batch = collate_prompts(samples_of(model, 3, prompt=True))

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(model, batch, {2}, max_new_tokens=8, temperature=1.0, top_p=0.9)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_only_adapters_train_with_lora_and_merging_keeps_the_logits() -> None:
    model = tiny_vlm(decoder=tiny_decoder(Lora(rank=4)))
    trained = trained_parameters(model.decoder)
    names = {name for name, p in model.decoder.named_parameters() for q in trained if p is q}
    assert names
    assert all(".lora_" in name for name in names)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.02)
    batch = batch_of(model)
    before = model.logits(batch)
    merge_adapters(model)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model.logits(batch), before, atol=1e-5, rtol=1e-4)


def test_a_part_whose_grid_is_not_what_it_does_is_named(model: VLM) -> None:
    batch = batch_of(model)
    batch.image_grids = tuple(grid._replace(rows=grid.rows + 1) for grid in batch.image_grids)
    with pytest.raises(ValueError, match="a part's grid is not what it does"):
        model(batch, NEXT_TOKEN)
