"""Images that see all of themselves in the decoder: exact in every kind of row, as transformers' models do it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from lit_vlm.checkpoints.published import export_published
from lit_vlm.core.batch import Grid
from lit_vlm.core.flops import attention
from lit_vlm.data import ChatML, SquareCrop
from lit_vlm.data.sample.collate import collate, collate_prompts, make_rows
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import DivideAndConquer, HFDecoder, check_cache, check_images
from lit_vlm.decoders.images import see_whole_images
from lit_vlm.embedders import Splice
from lit_vlm.gguf.export import export_gguf
from lit_vlm.model.build import build
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import VLM
from lit_vlm.training.sharding import OncePerForward
from tests.decoders.test_order import SIZES
from tests.tiny import LLAMA, spec_of, tiny_slots

CPU = torch.device("cpu")
CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-5}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 7}


def model_of(seed: int = 0, kind: type[HFDecoder] = HFDecoder, tasks: int = 0, **settings: Any) -> VLM:
    """A tiny model whose images see all of themselves in the decoder."""
    torch.manual_seed(seed)
    chosen = {"config": LLAMA, "tokenizer": "bytes", "image_attention": "bidirectional"} | settings
    embedder: Any = partial(Splice, task_tokens={"own": tasks}) if tasks else Splice
    return build(tiny_slots(decoder=partial(kind, **chosen), embedder=embedder)).eval()


def sample_of(model: VLM, name: str, parts: Sequence[int | None], seed: int) -> Sample:
    """A sample of so many words, or a picture where there is None, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    sample = Sample(name, "made", [], [], [], [], [])
    for part in parts:
        if part is None:
            grid = model.grid_map(model.encoder.patch_grid(28, 28))
            sample.image_starts.append(len(sample.ids))
            sample.grids.append(grid)
            sample.images.append(torch.randint(0, 256, (3, 28, 28), generator=generator).byte())
            sample.ids.extend([0] * grid.num_tokens)
            sample.labels.extend([-100] * grid.num_tokens)
        else:
            words = torch.randint(0, 200, (part,), generator=generator).tolist()
            sample.ids.extend(words)
            sample.labels.extend(words)
    sample.labels[0] = -100
    return sample


SHAPES: list[list[int | None]] = [[3, None, None, 5], [None, 2], [6], [2, None, 1, None, 1, 4]]
"""Samples with two pictures side by side, with one at its start, without any, and with two apart."""


def samples_of(model: VLM) -> list[Sample]:
    return [sample_of(model, f"sample-{i}", shape, i) for i, shape in enumerate(SHAPES)]


def explicit_mask(rows: Sequence[Sequence[Sample]], length: int) -> Tensor:
    """What each position sees, position by position: `[b, 1, l, l]`."""
    seen = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    for row, samples in enumerate(rows):
        begin = 0
        for sample in samples:
            for query in range(len(sample)):
                for key in range(len(sample)):
                    both = any(
                        start <= query < start + grid.num_tokens and start <= key < start + grid.num_tokens
                        for start, grid in zip(sample.image_starts, sample.grids, strict=True)
                    )
                    seen[row, 0, begin + query, begin + key] = key <= query or both
            begin += len(sample)
        for padding in range(begin, length):
            seen[row, 0, padding, padding] = True
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_logits_are_those_of_a_llama_with_the_mask_written_out(packed: bool, attention: str) -> None:
    model = model_of(attention=attention)
    samples = samples_of(model)
    rows = [samples[:3], samples[3:]] if packed else [[sample] for sample in samples]
    batch = make_rows(rows)
    decoder = model.decoder
    assert isinstance(decoder, HFDecoder)
    seen = explicit_mask(rows, batch.input_ids.shape[1])
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = model.logits(batch)
        expected = decoder.lm(
            inputs_embeds=model.embed(batch), position_ids=batch.position_ids, attention_mask=added
        ).logits
    present = batch.segment_ids > 0
    torch.testing.assert_close(found[present], expected[present], **CLOSE)
    causal = model_of(attention=attention, image_attention="causal").logits(batch)
    assert float((found - causal)[present].detach().abs().max()) > 0.01


@pytest.mark.parametrize("kind", [HFDecoder, DivideAndConquer])
def test_packed_samples_have_the_losses_and_gradients_that_they_have_alone(kind: type[HFDecoder]) -> None:
    found = []
    for packed in (False, True):
        model = model_of(kind=kind)
        samples = samples_of(model)
        batches = [make_rows([samples])] if packed else [collate([sample]) for sample in samples]
        sums = [model(batch, {"next_token": 1.0})["next_token"] for batch in batches]
        torch.stack(sums).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_from_a_cache_are_those_of_whole_sequences(attention: str) -> None:
    model = model_of(attention=attention)
    prompts = samples_of(model)
    answers = generate(model, collate_prompts(prompts), [-1], 4)
    for sample, answer in zip(prompts, answers, strict=True):
        for token in answer:
            with torch.no_grad():
                assert int(model.logits(collate([sample]))[0, -1].argmax()) == token
            sample.ids, sample.labels = [*sample.ids, token], [*sample.labels, token]


def test_rows_without_images_run_as_in_a_causal_decoder() -> None:
    sample = [sample_of(model_of(), "text", [6], 0)]
    models = [model_of(), model_of(image_attention="causal")]
    one, other = (model.logits(make_rows([sample * 2])) for model in models)
    assert torch.equal(one, other)


def test_task_tokens_behind_an_image_are_none_of_its_tokens() -> None:
    model = model_of(tasks=2)
    sample = sample_of(model, "a", [1, None, 3], 0)
    batch = collate([sample])
    patches, tasks = sample.grids[0].picture_tokens, sample.grids[0].suffix
    assert tasks == 2
    with torch.no_grad():
        before = model.decoder(model.embed(batch), batch.position_ids, visual=batch.image_positions, grids=sample.grids)
        model.embedder.tasks["own"].add_(1.0)  # type: ignore[union-attr, index]
        after = model.decoder(model.embed(batch), batch.position_ids, visual=batch.image_positions, grids=sample.grids)
    changed = (before.hidden != after.hidden).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(1 + patches, len(sample)))


def test_class_tokens_and_row_ends_are_tokens_of_their_image() -> None:
    grid = Grid(2, 2, prefix=1, row_end=1, suffix=2)
    places = torch.arange(1, 1 + grid.num_tokens)
    seen = see_whole_images(torch.arange(grid.num_tokens + 2)[None], places, [grid], None)[0, 0]
    assert seen[1 : 1 + grid.picture_tokens, 1 : 1 + grid.picture_tokens].all()
    assert not seen[: 1 + grid.picture_tokens, 1 + grid.picture_tokens :].any()
    assert torch.equal(seen[8:, 8:], torch.ones(len(seen) - 8, len(seen) - 8).tril().bool())


# ------------------------------------------------------------------ transformers' own models

IMAGE = 6
"""Tokens of an image: more than the window of Gemma's layers below, so that both limits meet."""
ROW = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
"""Two images apart, 1 for their tokens; transformers takes images side by side for one."""
PLACES = ROW.nonzero().flatten()
GRIDS = [Grid(2, 3), Grid(1, 6)]


def gemma3(layers: int, attention: str) -> tuple[Gemma3ForConditionalGeneration, HFDecoder]:
    """transformers' Gemma 3 with layers of windows and of all, and the decoder of its text part."""
    text = SIZES | {"num_hidden_layers": layers, "sliding_window": 4, "vocab_size": 300}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
    vision = VISION | {"model_type": "siglip_vision_model"}
    torch.manual_seed(0)
    settings = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    settings._attn_implementation = attention
    whole = Gemma3ForConditionalGeneration(settings).eval()
    decoder = HFDecoder(config=text | {"model_type": "gemma3_text"}, tokenizer="bytes", attention=attention,
                        image_attention="bidirectional").eval()  # type: ignore[arg-type]  # fmt: skip
    decoder.lm.model.load_state_dict(whole.model.language_model.state_dict())
    decoder.lm.lm_head.load_state_dict(whole.lm_head.state_dict())
    return whole, decoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gemma_3_gives_the_same_logits(attention: str) -> None:
    whole, decoder = gemma3(4, attention)
    embeds = torch.randn(1, len(ROW), decoder.width, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(len(ROW))[None]
    with torch.no_grad():
        expected = whole(inputs_embeds=embeds, token_type_ids=ROW[None], position_ids=positions).logits
        found = decoder.logits(decoder(embeds, positions, visual=PLACES, grids=GRIDS).hidden)
        causal = decoder.logits(decoder(embeds, positions).hidden)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert float((found - causal).abs().max()) > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gemma_3_goes_on_from_a_cache_in_the_same_way(attention: str) -> None:
    whole, decoder = gemma3(4, attention)
    length, new, padding = len(ROW), 3, 5
    embeds = torch.randn(2, length + new, decoder.width, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, length + new, dtype=torch.long)
    mask[1, :padding] = 0
    kinds = torch.stack([ROW, ROW.roll(3)])  # both images of the second row stand behind its padding
    places = kinds.flatten().nonzero().flatten()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        prompt = {"inputs_embeds": embeds[:, :length], "position_ids": positions[:, :length]}
        first = whole(**prompt, attention_mask=mask[:, :length], token_type_ids=kinds, use_cache=True)
        second = whole(inputs_embeds=embeds[:, length:], position_ids=positions[:, length:], attention_mask=mask,
                       past_key_values=first.past_key_values, use_cache=True)  # fmt: skip
        cache = decoder.new_cache()
        own = [
            decoder(embeds[:, :length], positions[:, :length], cache=cache, attention_mask=mask[:, :length],
                    visual=places, grids=GRIDS * 2),
            decoder(embeds[:, length:], positions[:, length:], cache=cache, attention_mask=mask),
        ]  # fmt: skip
    for output, expected in zip(own, (first, second), strict=True):
        present = mask[:, : output.hidden.shape[1]].bool() if output is own[0] else mask[:, length:].bool()
        torch.testing.assert_close(decoder.logits(output.hidden)[present], expected.logits[present], **CLOSE)


def test_paligemma_gives_the_same_logits_where_its_prefix_is_an_image() -> None:
    text = SIZES | {"vocab_size": 300, "model_type": "gemma"}
    vision = VISION | {"model_type": "siglip_vision_model", "projection_dim": 64}
    torch.manual_seed(0)
    whole = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=64)
    ).eval()
    decoder = HFDecoder(config=text, tokenizer="bytes", image_attention="bidirectional").eval()
    decoder.lm.model.load_state_dict(whole.model.language_model.state_dict())
    decoder.lm.lm_head.load_state_dict(whole.lm_head.state_dict())
    embeds = torch.randn(1, 11, 64, generator=torch.Generator().manual_seed(0))
    suffix = torch.tensor([[0] * IMAGE + [1] * (11 - IMAGE)])
    with torch.no_grad():
        expected = whole(inputs_embeds=embeds, token_type_ids=suffix).logits
        output = decoder(embeds, torch.arange(11)[None], visual=torch.arange(IMAGE), grids=[Grid(2, 3)])
    torch.testing.assert_close(decoder.logits(output.hidden), expected, **CLOSE)


# ------------------------------------------------------------------ checks, and what cannot be


def test_a_decoder_whose_layers_take_no_mask_is_refused() -> None:
    decoder = HFDecoder(config=LLAMA, tokenizer="bytes", image_attention="bidirectional").eval()
    check_images(decoder, packed=True, device=CPU)
    check_cache(decoder, CPU)
    inner = decoder.base.forward
    decoder.base.forward = lambda attention_mask, **rest: inner(attention_mask=None, **rest)
    with pytest.raises(
        ValueError, match="does not let the tokens of an image see all of it.*image_attention to causal"
    ):
        check_images(decoder, packed=False, device=CPU)


def test_an_image_that_sees_the_next_one_is_refused() -> None:
    decoder = HFDecoder(config=LLAMA, tokenizer="bytes", image_attention="bidirectional").eval()
    inner = decoder.forward

    def one_image(*args: Any, grids: Sequence[Grid] = (), **rest: Any) -> Any:
        return inner(*args, grids=[Grid(1, sum(grid.num_tokens for grid in grids))] if grids else grids, **rest)

    decoder.forward = one_image  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="nothing else behind them"):
        check_images(decoder, packed=False, device=CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flex_attention"}, "flex_attention takes no mask.*attention to sdpa or eager"),
        ({"config": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}}, "layers of type conv.*causal"),
    ],
)
def test_what_cannot_see_whole_images_is_refused(settings: dict[str, Any], message: str) -> None:
    sizes = LLAMA | {"num_hidden_layers": 2}
    config = {"config": sizes | settings.get("config", {})}
    with pytest.raises(ValueError, match=message):
        HFDecoder(tokenizer="bytes", image_attention="bidirectional", **(settings | config))


def test_images_without_their_grids_or_behind_a_cache_are_refused() -> None:
    decoder = model_of().decoder
    embeds, positions = torch.randn(1, 6, 64), torch.arange(6)[None]
    with pytest.raises(ValueError, match="give the decoder the images' grids"):
        decoder(embeds, positions, visual=torch.arange(3))
    with pytest.raises(ValueError, match="first positions that a cache gets"):
        decoder(embeds, positions, cache=decoder.new_cache(), attention_mask=torch.ones(1, 9), visual=torch.arange(3),
                grids=[Grid(1, 3)])  # fmt: skip


def test_forms_whose_decoders_are_causal_are_refused(tmp_path: Path) -> None:
    model = model_of()
    written = SampleFormat(ChatML(), SquareCrop(), 256, False)
    with pytest.raises(ValueError, match="llava-hf has no decoder with image_attention: bidirectional.*--format hf"):
        export_published("llava-hf", model, tmp_path / "out", None)
    with pytest.raises(ValueError, match="gguf has no decoder with image_attention"):
        export_gguf(model, written, spec_of(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_keeps_the_setting(tmp_path: Path) -> None:
    from tests.exports import exported

    own = {"class_path": "lit_vlm.decoders.HFDecoder",
           "init_args": {"config": LLAMA, "tokenizer": "bytes", "image_attention": "bidirectional"}}  # fmt: skip
    _, differences = exported(tmp_path / "out", "llava15", decoder=own)
    assert differences.logits < 1e-4
    assert '"image_attention": "bidirectional"' in (tmp_path / "out" / "config.json").read_text()


def test_pairs_of_an_image_are_counted() -> None:
    model = model_of()
    causal = model_of(image_attention="causal")
    batch = collate(samples_of(model))
    more = model.decoder.flops()(batch).forward - causal.decoder.flops()(batch).forward
    patches = [grid.num_tokens for grid in batch.image_grids]
    pairs = sum(n * n for n in patches) - sum(n * (n + 1) / 2 for n in patches)
    assert more == pytest.approx(attention(model.decoder.attention_width, pairs).forward)


def test_each_block_runs_once_for_rows_with_images_and_without() -> None:
    model = model_of()
    OncePerForward("decoder", model.decoder, model.decoder.blocks())
    samples = samples_of(model)
    for batch in (collate(samples), collate(samples[2:3])):
        model(batch, {"next_token": 1.0})["next_token"].backward()
