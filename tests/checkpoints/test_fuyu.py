"""Fuyu: parity with transformers' own model and processor, and published names in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, normalizers
from torch import Tensor
from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor, PreTrainedTokenizerFast
from transformers.image_utils import SizeDict

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published import FAMILIES
from lit_vlm.checkpoints.published.fuyu import NAMES
from lit_vlm.core.batch import Batch, PixelSpec
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data import FitBox, Fuyu
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sample.collate import collate, collate_prompts, make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import LinearPatches
from lit_vlm.model.build import build
from lit_vlm.model.generate import generate
from lit_vlm.model.vlm import NEXT_TOKEN, VLM
from lit_vlm.projectors import Identity
from tests.tiny import spec_of, tiny_slots

MARKS = ("|SPEAKER|", "|NEWLINE|", "<s>", "<0x04>")
PLACE, ROW_END = 259, 260
PATCH = 5
LANGUAGE: dict[str, Any] = {
    "model_type": "persimmon", "vocab_size": 263, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rope_theta": 25000.0,
}  # fmt: skip
PARTS: dict[str, Any] = {
    "encoder": partial(LinearPatches, width=64, patch=PATCH, row_end=False),
    "projector": Identity,
    "embedder": partial(Splice, row_end="|NEWLINE|"),
    "decoder": partial(HFDecoder, config=LANGUAGE, tokenizer="bytes", new_tokens=MARKS),
}
PIXELS = PixelSpec(None, PATCH, (0.5, 0.5, 0.5))
SHAPES = [[(15, 10)], [], [(5, 25), (20, 10), (10, 10)], [(5, 5)]]
"""(height, width) of the pictures of each sample."""


def published() -> FuyuForCausalLM:
    """transformers' own model, in which no weight is what it was drawn as: biases and norms too."""
    torch.manual_seed(0)
    settings = {key: value for key, value in LANGUAGE.items() if key != "model_type"}
    model = FuyuForCausalLM(FuyuConfig(**settings, patch_size=PATCH, image_token_id=PLACE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def theirs() -> FuyuForCausalLM:
    return published()


@pytest.fixture(scope="module")
def folder(theirs: FuyuForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that transformers writes, with a tokenizer that has Fuyu's marks."""
    path = tmp_path_factory.mktemp("fuyu")
    theirs.save_pretrained(path)
    tokenizer_of_fuyu().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> VLM:
    return load_published("fuyu", str(folder))


def tokenizer_of_fuyu() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS], special_tokens=True)
    return tokenizer


def samples(model: VLM) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, sizes in enumerate(SHAPES):
        sample = Sample(f"{number}", "made", [], [])
        for height, width in sizes:
            sample.images.append(torch.randint(0, 256, (3, height, width), generator=generator).byte())
            sample.grids.append(model.grid_map(model.encoder.patch_grid(height, width)))
            sample.image_starts.append(len(sample.ids))
            sample.ids += [0] * sample.grids[-1].num_tokens
            sample.labels += [-100] * sample.grids[-1].num_tokens
            sample.ids += torch.randint(3, 259, (2,), generator=generator).tolist()
            sample.labels += [-100, -100]
        text = torch.randint(3, 259, (5 + number,), generator=generator).tolist()
        sample.ids += text
        sample.labels += text
        made.append(sample)
    return made


def their_inputs(sample: Sample, place: int = PLACE, row_end: int = ROW_END) -> tuple[Tensor, Tensor]:
    """Ids `[1, s]` and patches `[p, 3·patch·patch]`, as transformers' processor lays them out."""
    ids, patches = list(sample.ids), []
    for start, grid, image in zip(sample.image_starts, sample.grids, sample.images, strict=True):
        row = [place] * grid.cols + [row_end]
        ids[start : start + grid.num_tokens] = row * grid.rows
        patches.append(FuyuImageProcessor().patchify_image((image.float() / 127.5 - 1)[None], size_of(PATCH))[0])
    return torch.tensor([ids]), torch.cat(patches) if patches else torch.empty(0, 3 * PATCH**2)


def size_of(side: int) -> SizeDict:
    return SizeDict(height=side, width=side)


def their_logits(model: FuyuForCausalLM, sample: Sample) -> Tensor:
    ids, patches = their_inputs(sample)
    return model(input_ids=ids, pixel_values=patches[None] if len(patches) else None).logits[0]


def batches(made: Sequence[Sample]) -> dict[str, Batch]:
    return {"padded": collate(made), "packed": make_rows([[made[0], made[1]], [made[2], made[3]]])}


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_logits_are_those_of_transformers(form: str, theirs: FuyuForCausalLM, ours: VLM) -> None:
    made = samples(ours)
    batch = batches(made)[form]
    assert (len(batch.input_ids) < len(made)) == (form == "packed")
    with torch.no_grad():
        logits = ours.logits(batch)
        for info, sample in zip(batch.samples, made, strict=True):
            found = logits[info.row][batch.segment_ids[info.row] == info.segment]
            torch.testing.assert_close(found, their_logits(theirs, sample), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_loss_and_gradients_are_those_of_transformers(form: str, theirs: FuyuForCausalLM, ours: VLM) -> None:
    made = samples(ours)
    ours.zero_grad()
    theirs.zero_grad()
    loss = ours(batches(made)[form], {NEXT_TOKEN: 1.0})[NEXT_TOKEN]
    loss.backward()
    total = torch.zeros(())
    for sample in made:
        labels = torch.tensor(sample.labels)[1:]
        logits = their_logits(theirs, sample)[:-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    total.backward()
    torch.testing.assert_close(loss, total, atol=1e-4, rtol=1e-5)
    state = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head", "language_model.lm_head")
        .replace("model.vision_", "vision_"): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    expected = {f"{s}.{k}": v for s, part in NAMES.slots_of(state, {}).items() for k, v in part.items()}
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], value, atol=1e-5 * max(1.0, scale), rtol=1e-4, msg=name)
    assert found["decoder.lm.model.embed_tokens.weight"][ROW_END].any()  # type: ignore[index]


def test_greedy_answers_are_those_of_transformers(theirs: FuyuForCausalLM, ours: VLM) -> None:
    made = samples(ours)
    answers = generate(ours, collate_prompts(made), [-1], 5)
    for sample, answer in zip(made, answers, strict=True):
        ids, patches = their_inputs(sample)
        images = {"pixel_values": patches[None]} if len(patches) else {}
        out = theirs.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0, **images)
        assert answer == out[0, ids.shape[1] :].tolist()


def tokenizer_of_pieces() -> PreTrainedTokenizerFast:
    """Marks are pieces of the vocabulary, and every text gets an underscore in front, as Fuyu's processor expects."""
    pieces = ["<unk>", *MARKS, "|ENDOFTEXT|", "\u2581", "\n", *"abcdefghijklmnopqrstuvwxyzW?", "\u2581is", "\u2581it"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(MARKS) < i)) for i, piece in enumerate(pieces)], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|ENDOFTEXT|", unk_token="<unk>")


def test_a_prompt_is_that_of_transformers_processor(tmp_path: Path) -> None:
    plain = tokenizer_of_pieces()
    plain.pad_token = "<unk>"
    plain.save_pretrained(tmp_path)
    processor = FuyuProcessor(FuyuImageProcessor(patch_size=dict(size_of(PATCH)), size={"height": 40, "width": 60}),
                              tokenizer_of_pieces())  # fmt: skip
    decoder = partial(HFDecoder, config=LANGUAGE, tokenizer=str(tmp_path), new_tokens=MARKS)
    model = build(tiny_slots(**PARTS | {"decoder": decoder}))
    assert model.decoder.vocab_size == LANGUAGE["vocab_size"]  # the marks keep the ids that the vocabulary gives them
    noise = np.random.default_rng(0).integers(0, 256, (33, 171, 3), dtype=np.uint8)
    PILImage.fromarray(noise).save(tmp_path / "a.png")
    asked = Message("user", (Image("a.png"), Text("What is it?")))
    answer = Message("assistant", (Text("a bus"),))
    encode = SampleEncoder(spec_of(model), Fuyu(), FitBox(60, 40), 512)
    sample = encode(Record("a", "made", (asked, answer)), tmp_path)
    (prompt,) = replace(encode, prompt=True).sequences(Record("a", "made", (asked,)), tmp_path)
    expected = processor(images=[PILImage.fromarray(noise)], text="What is it?\n", return_legacy_image_output=False)
    marks = plain.convert_tokens_to_ids(["|SPEAKER|", "|NEWLINE|"])
    ids, patches = their_inputs(prompt, *marks)
    assert ids.tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(patches, expected["pixel_values"])
    spelled = plain.convert_tokens_to_ids(["\u2581", *"a", "\u2581", *"bus", "|ENDOFTEXT|"])
    assert [label for label in sample.labels if label != -100] == spelled
    assert sample.ids == [*prompt.ids, *spelled]


@pytest.mark.parametrize("size", [(1920, 1080), (1921, 1080), (1080, 1920), (4000, 3000), (3000, 400), (31, 29), (1, 1),
                                  (640, 481), (1919, 1079), (1367, 2111), (2500, 1081), (10, 5000)])  # fmt: skip
def test_pictures_are_those_of_transformers_processor(size: tuple[int, int]) -> None:
    noise = PILImage.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    found = FitBox()(noise, PixelSpec(None, 30, (0.5, 0.5, 0.5)))
    processor = FuyuImageProcessor()
    made = processor(noise, return_tensors="pt")
    height, width = made["image_unpadded_heights"][0][0], made["image_unpadded_widths"][0][0]
    assert found.shape[1:] == (-(-int(height) // 30) * 30, -(-int(width) // 30) * 30)
    pixels = made["images"][0][0][:, : found.shape[1], : found.shape[2]]
    difference = (pixels - (found.float() / 127.5 - 1)).abs() * 127.5
    assert float(difference.max()) < 1e-3


def test_sizes_are_those_of_transformers_processor() -> None:
    box, spec, processor = FitBox(), PixelSpec(None, 30, (0.5, 0.5, 0.5)), FuyuImageProcessor()
    random = np.random.default_rng(2)
    for width, height in random.integers(40, 6000, (400, 2)).tolist():
        shape = processor.resize(
            torch.empty(1, 3, height, width, device="meta"), SizeDict(height=1080, width=1920)
        ).shape
        assert box.size((width, height), spec) == tuple(-(-side // 30) * 30 for side in (shape[-1], shape[-2]))


def test_every_published_key_arrives(theirs: FuyuForCausalLM, folder: Path, ours: VLM) -> None:
    weights = load_file(folder / "model.safetensors")
    assert {key.split(".")[0] for key in weights} == {"language_model", "vision_embed_tokens"}  # as adept/fuyu-8b
    assert sum(value.numel() for value in weights.values()) == sum(p.numel() for p in ours.parameters())
    config = json.loads((folder / "config.json").read_text())
    language = config.pop("text_config")
    left_out = ("model_type", "architectures", "rope_parameters")
    flat = config | {key: value for key, value in language.items() if key not in left_out}  # as adept/fuyu-8b has it
    again = load_published("fuyu", weights, flat | {"rope_theta": 25000.0, "image_newline_id": ROW_END})
    batch = collate(samples(ours))
    with torch.no_grad():
        assert torch.equal(again.logits(batch), ours.logits(batch))


def test_a_stage_starts_from_published_weights(folder: Path, ours: VLM) -> None:
    model = build(tiny_slots(**PARTS), read_slots(f"fuyu:{folder}")).eval()
    batch = collate(samples(ours))
    with torch.no_grad():
        assert torch.equal(model.logits(batch), ours.logits(batch))


def test_the_decoder_alone_comes_from_the_published_files(folder: Path, theirs: FuyuForCausalLM) -> None:
    decoder = partial(HFDecoder, str(folder))
    model = build(tiny_slots(decoder=decoder))
    own = model.decoder.state_dict()
    table = theirs.model.language_model.embed_tokens.weight
    assert torch.equal(own["lm.model.embed_tokens.weight"], table)
    assert torch.equal(own["lm.lm_head.weight"], theirs.lm_head.weight)


def test_an_export_is_read_by_transformers(tmp_path: Path, ours: VLM) -> None:
    assert FAMILIES["fuyu"].export(build(tiny_slots(**PARTS)), tmp_path / "new") <= 1e-5
    assert FAMILIES["fuyu"].export(ours, tmp_path / "out") <= 1e-5
    again, info = FuyuForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for sample in samples(ours):
        with torch.no_grad():
            logits = ours.logits(collate([sample]))[0]
            torch.testing.assert_close(their_logits(again.eval(), sample), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedder": Splice}, "fuyu is LinearPatches with row_end false"),
        ({"decoder": partial(HFDecoder, config=LANGUAGE, tokenizer="bytes", new_tokens=("|NEWLINE|",))},
         r"no '\|SPEAKER\|'.*new_tokens"),
    ],
)  # fmt: skip
def test_other_models_are_not_exported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES["fuyu"].export(build(tiny_slots(**PARTS | changes)), tmp_path / "out")


def test_patches_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"'vision_embed_tokens.weight' is \(4, 7\), not \[width, 3 · patch · patch\]"):
        load_published("fuyu", {"vision_embed_tokens.weight": torch.zeros(4, 7)}, {"model_type": "fuyu"})
