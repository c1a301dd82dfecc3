"""HoVLE's embedding against published activations, and what must hold in every form of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_vlm.checkpoints import load_published
from lit_vlm.checkpoints.published.hovle import fuse_qkv, split_qkv
from lit_vlm.core.batch import Batch, Grid, VisualTokens
from lit_vlm.data.sample.collate import collate, collate_prompts, make_rows
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import HFDecoder, Lora
from lit_vlm.embedders import Holistic
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.build import build
from lit_vlm.model.generate import Continuation, generate, score_continuations
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity, PatchMerge
from lit_vlm.training.stage import Stage
from tests.tiny import LLAMA, ROOT, tiny_decoder, tiny_slots, tiny_vlm

FIXTURE = torch.load(ROOT / "tests" / "fixtures" / "hovle.pt", weights_only=True)
TOY, PRE, FULL = FIXTURE["toy_config"], FIXTURE["pre"], FIXTURE["full_pre"]
SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 128}
FORMS = ("hovle", "hovle_hd", "bidirectional")


def published(state: dict[str, Tensor] | None = None, **changes: Any) -> VLM:
    """The toy model of the fixture, built from published names."""
    config = {"embedding_config": TOY | changes, "llm_config": FULL["llm_config"], "force_image_size": 56}
    family = "hovle_hd" if changes.get("pixel_shuffle_loc") == "post" else "hovle"
    return load_published(family, FULL["state_dict"] if state is None else state, config)


def fixture_batch(given: dict[str, Tensor], labels: Tensor | None = None, left: bool = False) -> Batch:
    """The fixture's sequences; each image of two tiles is one image here."""
    ids = given["input_ids"]
    samples = []
    for row, tokens in enumerate(ids.tolist()):
        starts = [tokens.index(FIXTURE["ids"]["ctx"])] if FIXTURE["ids"]["ctx"] in tokens else []
        row_labels = tokens if labels is None else labels[row].tolist()
        samples.append(Sample(str(row), "", tokens, row_labels, starts, [Grid(4, 2)] * len(starts)))
    return make_rows([[sample] for sample in samples], left=left)


def fixture_visual(model: VLM, pixels: Tensor) -> VisualTokens:
    """Visual tokens of two tiles per image, one tile below the other."""
    assert isinstance(model.encoder, ConvPatches)
    columns = pixels.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)
    features = model.encoder.embed(columns)
    return model.projector(VisualTokens(features.flatten(0, 1), (Grid(8, 4),) * len(columns)))


def embedding_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fixture's embedding in front of its decoder."""
    own = {f"embedding_model.{key}": value for key, value in state.items()}
    return {key: value for key, value in FULL["state_dict"].items() if key.startswith("language")} | own


def test_patches_and_merge_are_those_of_the_reference() -> None:
    model = published(embedding_of(PRE["state_dict"]))
    assert isinstance(model.encoder, ConvPatches)
    torch.testing.assert_close(model.encoder.embed(PRE["pixel_values"]), PRE["vision_embeddings"], rtol=0, atol=1e-5)
    merged = fixture_visual(model, PRE["pixel_values"])
    torch.testing.assert_close(merged.features.view(4, 4, -1), PRE["projected"], rtol=0, atol=1e-5)


def test_every_layer_is_that_of_the_reference() -> None:
    model = published(embedding_of(PRE["state_dict"]))
    found: list[Tensor] = []
    for block in model.embedder.blocks():
        block.register_forward_hook(lambda _module, _args, out: found.append(out))
    hidden = model.embedder(fixture_batch(PRE), fixture_visual(model, PRE["pixel_values"]), model.decoder)
    torch.testing.assert_close(hidden, PRE["hidden"], rtol=0, atol=1e-5)
    for own, reference in zip(found, PRE["layer_outputs"], strict=True):
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-5)


def test_text_alone_is_that_of_the_reference() -> None:
    model = published(embedding_of(PRE["state_dict"]))
    given = FIXTURE["pre_text_only"]
    batch = fixture_batch(given)
    visual = model.projector(model.encoder(model.encoder.dummy_images()))
    torch.testing.assert_close(model.embedder(batch, visual, model.decoder), given["hidden"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.embedder(batch, None, model.decoder), given["hidden"], rtol=0, atol=1e-5)


def test_logits_and_loss_are_those_of_the_reference() -> None:
    model = published()
    batch = fixture_batch(FULL, FULL["labels"])
    embeds = model.embedder(batch, fixture_visual(model, FULL["pixel_values"]), model.decoder)
    torch.testing.assert_close(embeds, FULL["inputs_embeds"], rtol=0, atol=1e-5)
    logits = model.decoder.logits(model.decoder(embeds, batch.position_ids).hidden)
    torch.testing.assert_close(logits, FULL["logits"], rtol=0, atol=1e-5)
    chosen = logits.flatten(0, 1)[batch.target_positions]
    torch.testing.assert_close(F.cross_entropy(chosen, batch.targets), FULL["loss"], rtol=0, atol=1e-5)


def test_queries_keys_and_values_part_and_meet_again() -> None:
    config = {"embedding_config": TOY, "llm_config": FULL["llm_config"]}
    split = split_qkv(FULL["state_dict"], config)
    fused = fuse_qkv(split, config)
    assert fused.keys() == FULL["state_dict"].keys()
    assert all(torch.equal(value, FULL["state_dict"][key]) for key, value in fused.items())


# ------------------------------------------------------------------ all forms


def model_of(form: str, **changes: Any) -> VLM:
    """A tiny model, in eval mode."""
    hd = form == "hovle_hd"
    attention = {"image_attention": "bidirectional"} if form == "bidirectional" else {}
    return build(
        tiny_slots(
            encoder=partial(ConvPatches, width=64, image_size=28, patch=7),
            projector=Identity if hd else PatchMerge,
            embedder=partial(Holistic, **SIZES | attention | changes, merge=2 if hd else 1),
        )
    ).eval()


def samples_for(model: VLM, count: int = 5, seed: int = 0) -> list[Sample]:
    """Texts of different lengths, with none, one or two images of one or three tiles."""
    rng = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        sample = Sample(str(number), "", [], [])
        for tiles in ((), (1,), (3,), (1, 3), (3, 1))[number % 5]:
            sample.ids += torch.randint(4, 250, (2 + number,), generator=rng).tolist()
            grid = model.grid_map(model.encoder.patch_grid(28 * tiles, 28))
            sample.image_starts.append(len(sample.ids))
            sample.grids.append(grid)
            sample.images.append(torch.randint(0, 256, (3, 28 * tiles, 28), generator=rng, dtype=torch.uint8))
            sample.ids += [0] * grid.num_tokens
        sample.ids += torch.randint(4, 250, (3 + number,), generator=rng).tolist()
        sample.labels = list(sample.ids)
        samples.append(sample)
    return samples


@pytest.mark.parametrize("form", FORMS)
def test_samples_do_not_see_each_other(form: str) -> None:
    model = model_of(form)
    samples = samples_for(model)
    alone = [model.logits(collate([sample]))[0] for sample in samples]
    padded = model.logits(collate(samples))
    packed = model.logits(make_rows([[samples[2], samples[0], samples[3]], [samples[4], samples[1]]]))
    starts = {2: (0, 0), 0: (0, len(samples[2])), 3: (0, len(samples[2]) + len(samples[0]))}
    starts |= {4: (1, 0), 1: (1, len(samples[4]))}
    for number, logits in enumerate(alone):
        torch.testing.assert_close(padded[number, : len(logits)], logits, rtol=0, atol=2e-5)
        row, start = starts[number]
        torch.testing.assert_close(packed[row, start : start + len(logits)], logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_cached_generation_gives_what_the_whole_sequence_gives(form: str, count: int) -> None:
    model = model_of(form)
    samples = samples_for(model)[-count:]
    rows = generate(model, collate_prompts(samples), stop_ids=[1], max_new_tokens=6)
    for sample, row in zip(samples, rows, strict=True):
        ids = list(sample.ids)
        for token in row:
            whole = Sample("", "", ids, ids, sample.image_starts, sample.grids, sample.images)
            assert int(model.logits(collate([whole]))[0, -1].argmax()) == token
            ids = [*ids, token]


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_scored_on_the_cache_as_in_the_whole_sequence(form: str) -> None:
    model = model_of(form)
    samples = samples_for(model)
    answers = [[5, 6, 7], [8], [9, 10]]
    asked = [(row, answer) for row in (4, 1, 0) for answer in answers]
    found = score_continuations(
        model, collate_prompts(samples), [Continuation(row, answer, answer) for row, answer in asked], batch_size=4
    )
    for (row, answer), score in zip(asked, found, strict=True):
        sample = samples[row]
        ids = [*sample.ids, *answer]
        whole = Sample("", "", ids, ids, sample.image_starts, sample.grids, sample.images)
        logits = model.logits(collate([whole]))[0, -len(answer) - 1 : -1]
        assert score == pytest.approx(F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item(), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_part_without_images_too(form: str) -> None:
    model = model_of(form)
    for text_only in (False, True):
        model.zero_grad()
        samples = samples_for(model)[:1] if text_only else samples_for(model)
        model(collate(samples), {"next_token": 1.0})["next_token"].backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert missing == ["decoder.lm.model.embed_tokens.weight"]
        trained = {name: 1e-3 for name, parts in model.slots().items() if list(parts[0].parameters())}
        Stage(train=trained).freeze(model)
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == missing


def test_a_word_table_that_is_the_decoder_s_head_too_goes_on_training() -> None:
    model = build(tiny_slots(embedder=partial(Holistic, **SIZES), decoder=tiny_decoder(tie_word_embeddings=True)))
    Stage(train={"decoder": 1e-3}).freeze(model)
    assert all(p.requires_grad for p in model.decoder.parameters())


def test_whole_images_are_seen_where_attention_is_bidirectional() -> None:
    sample = samples_for(model_of("hovle"))[1]
    changed = samples_for(model_of("hovle"))[1]
    changed.images[0][:, 14:] = 255 - changed.images[0][:, 14:]  # the lower half
    start = sample.image_starts[0]
    for form, sees in (("hovle", False), ("bidirectional", True)):
        model = model_of(form)
        one, other = (model.embed(collate([s]))[0, start] for s in (sample, changed))
        assert torch.equal(one, other) != sees


def test_the_embedding_starts_from_the_decoder() -> None:
    model = model_of("hovle")
    table = model.decoder.lm.get_input_embeddings().weight  # type: ignore[union-attr]
    assert torch.equal(model.embedder.stack.embed_tokens.weight, table)  # type: ignore[union-attr]
    for own, theirs in zip(model.embedder.blocks(), model.decoder.blocks(), strict=False):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in own.state_dict().items())
    adapted = build(tiny_slots(embedder=partial(Holistic, **SIZES), decoder=tiny_decoder(Lora(rank=2))))
    for own, theirs in zip(adapted.embedder.blocks(), model.decoder.blocks(), strict=False):
        assert own.state_dict().keys() == theirs.state_dict().keys()
    random = model_of("hovle", start="random", num_layers=5)
    assert torch.equal(random.embedder.stack.embed_tokens.weight, table)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="set num_layers"):
        model_of("hovle", num_layers=4)
    with pytest.raises(ValueError, match="set num_layers"):
        model_of("hovle", ffn_width=96)


def test_positions_are_resampled_for_other_tiles() -> None:
    torch.manual_seed(0)
    small = ConvPatches(width=8, image_size=28, patch=7)
    large = ConvPatches(width=8, image_size=42, patch=7, trained_size=28)
    with torch.no_grad():
        small.position_embedding[0, 1:] = torch.arange(16.0)[:, None]  # rises along rows and columns
    large.load_state_dict(small.state_dict())
    table = large._positions()[:, 0].view(6, 6)
    assert (table.diff(dim=0) > 0).all()
    assert (table.diff(dim=1) > 0).all()
    torch.testing.assert_close(table.mean(), torch.tensor(7.5), rtol=0, atol=1e-3)


def test_layers_of_another_family_are_not_taken_for_llamas() -> None:
    qwen = {**LLAMA, "model_type": "qwen2"}
    with pytest.raises(ValueError, match=r"layers of a 'qwen2' are not Llama's \(0.self_attn.k_proj.bias\)"):
        tiny_vlm(
            encoder=partial(ConvPatches, 64, 28, 7),
            projector=PatchMerge,
            embedder=partial(Holistic, num_layers=1, num_heads=4, num_kv_heads=2, ffn_width=128),
            decoder=partial(HFDecoder, config=qwen, tokenizer="bytes"),
        )
