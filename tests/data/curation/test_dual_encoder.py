"""Vectors of pictures and texts by tiny models, against the models themselves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import CLIPModel, CLIPProcessor, SiglipModel, SiglipProcessor

from lit_vlm.data.curation.dual_encoder import DualEncoder
from lit_vlm.data.curation.embeddings import PictureEmbeddings, TextEmbeddings, texts_of
from lit_vlm.data.curation.step import Sample
from lit_vlm.data.records import Image, Message, Record, Text
from tests.data.curation.dual import LENGTH, save_clip, save_siglip

KINDS = [(save_clip, CLIPModel, CLIPProcessor), (save_siglip, SiglipModel, SiglipProcessor)]
TEXTS = ["a red circle", "", "a blue square " * 20, "a red circle"]


@pytest.fixture(scope="module")
def pictures() -> list[PILImage.Image]:
    rng = np.random.default_rng(0)
    return [
        PILImage.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 28), (28, 50), (9, 9))
    ]


@pytest.mark.parametrize(("save", "kind", "processor"), KINDS)
def test_vectors_are_those_of_the_model_and_its_processor(
    save: Callable[[Path], str], kind: type, processor: type, tmp_path: Path, pictures: list[PILImage.Image]
) -> None:
    name = save(tmp_path / "model")
    encoder = DualEncoder(name, batch_size=2)
    model, whole = kind.from_pretrained(name), processor.from_pretrained(name)
    with torch.inference_mode():
        inputs = whole(text=TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        texts = model.get_text_features(**inputs).pooler_output
        seen = model.get_image_features(**whole(images=pictures, return_tensors="pt")).pooler_output
    for found, wanted in (
        (encoder.embed(encoder.text_inputs(TEXTS)), texts),
        (encoder.embed(encoder.picture_inputs(pictures)), seen),
    ):
        assert found.shape == (len(wanted), encoder.width)
        np.testing.assert_allclose(found, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert np.abs(found @ found.T - 1)[0, 1] > 1e-3  # different things have different vectors
    assert inputs["input_ids"].shape[1] == LENGTH


def test_bf16_is_near_fp32_and_has_another_key(tmp_path: Path, pictures: list[PILImage.Image]) -> None:
    name = save_clip(tmp_path / "model")
    full, half = DualEncoder(name), DualEncoder(name, dtype="bfloat16")
    inputs = full.picture_inputs(pictures)
    one, other = full.embed(inputs), half.embed(inputs)
    assert not np.array_equal(one, other)
    assert ((one * other).sum(1) > 0.99).all()
    assert PictureEmbeddings(full).key != PictureEmbeddings(half).key


def test_the_key_is_that_of_weights_and_preprocessing_and_of_no_path(tmp_path: Path) -> None:
    one, same = DualEncoder(save_clip(tmp_path / "a")), DualEncoder(save_clip(tmp_path / "b"), batch_size=3)
    assert PictureEmbeddings(one).key == PictureEmbeddings(same).key
    assert PictureEmbeddings(one).key != TextEmbeddings(one).key
    assert one.digest != DualEncoder(save_clip(tmp_path / "c", seed=1)).digest
    config = tmp_path / "b" / "processor_config.json"
    settings = json.loads(config.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    config.write_text(json.dumps(settings))
    assert DualEncoder(str(tmp_path / "b")).digest != one.digest


def test_a_pickled_encoder_gives_the_same(tmp_path: Path) -> None:
    encoder = DualEncoder(save_siglip(tmp_path / "model"))
    inputs = encoder.text_inputs(TEXTS)
    vectors = encoder.embed(inputs)
    sent = pickle.dumps(encoder)
    assert len(sent) < 2000  # without weights
    np.testing.assert_array_equal(pickle.loads(sent).embed(inputs), vectors)


def _cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _rename_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"), [(_cut_weights, "cannot be read"), (_rename_weights, "lacks 16 weights")]
)
def test_a_damaged_model_is_refused_by_name(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    name = save_clip(tmp_path / "model")
    spoil(tmp_path / "model")
    encoder = DualEncoder(name)
    with pytest.raises(ValueError, match=message) as caught:
        encoder.embed(encoder.text_inputs(["a"]))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_dual_encoder_is_refused(tmp_path: Path) -> None:
    name = save_clip(tmp_path / "model")
    CLIPModel.from_pretrained(name).vision_model.save_pretrained(name)
    encoder = DualEncoder(name)
    with pytest.raises(ValueError, match="is no dual encoder"):
        encoder.embed(encoder.text_inputs(["a"]))
    with pytest.raises(ValueError, match="nowhere"):
        DualEncoder("./nowhere")
    with pytest.raises(ValueError, match="dtype is 'fp8'"):
        DualEncoder(name, dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        DualEncoder(name, batch_size=0)


IMAGE = Image(data=b"")


def _document(*parts: str | Image) -> Record:
    content = tuple(part if isinstance(part, Image) else Text(part) for part in parts)
    return Record("d", "s", (Message("document", content),))


@pytest.mark.parametrize(
    ("parts", "texts"),
    [
        (("Intro.", IMAGE, " First. ", IMAGE, "Second."), ["First.", "Second."]),
        ((IMAGE, IMAGE, "Both."), ["Both.", "Both."]),
        (("In front.", IMAGE, "\n"), ["In front."]),
        ((IMAGE, "Behind.", IMAGE), ["Behind.", "Behind."]),
        ((IMAGE,), [""]),
        (("No picture.",), []),
    ],
)
def test_a_picture_in_a_document_goes_with_the_text_behind_it(parts: tuple[str | Image, ...], texts: list[str]) -> None:
    assert texts_of(_document(*parts)) == texts


def test_a_picture_in_a_conversation_goes_with_what_the_assistant_says() -> None:
    turns = (
        Message("user", (IMAGE, Text("What is it?"), IMAGE)),
        Message("assistant", (Text(" A cat. "),)),
        Message("user", (Text("And there?"), IMAGE)),
        Message("assistant", (Text("A dog."),)),
    )
    assert texts_of(Record("c", "s", turns)) == ["A cat. A dog."] * 3
    assert texts_of(Record("c", "s", turns[:1])) == ["", ""]


def test_measures_have_a_row_for_each_picture_and_zeros_for_no_text(
    tmp_path: Path, pictures: list[PILImage.Image]
) -> None:
    encoder = DualEncoder(save_clip(tmp_path / "model"))
    said = _document(IMAGE, "a red circle", IMAGE, "a blue square")
    samples = [
        Sample(said, (b"", b""), tuple(pictures[:2])),
        Sample(_document("words"), (), ()),
        Sample(_document(IMAGE), (b"",), (pictures[2],)),
        Sample(_document(IMAGE, "a red circle"), (b"",), (pictures[0],)),
    ]
    seen, texts = (measure(samples)["vector"] for measure in (PictureEmbeddings(encoder), TextEmbeddings(encoder)))
    assert seen.shape == texts.shape == (4, 16)
    assert seen.dtype == texts.dtype == np.float16
    np.testing.assert_array_equal(seen[0], seen[3])
    np.testing.assert_array_equal(texts[0], texts[3])
    np.testing.assert_array_equal(texts[2], np.zeros(16))
    wanted = encoder.embed(encoder.text_inputs(["a blue square"]))[0]
    np.testing.assert_allclose(texts[1].astype(np.float32), wanted, atol=2e-3)
    only = TextEmbeddings(encoder)(samples[2:3])["vector"]
    np.testing.assert_array_equal(only, np.zeros((1, 16)))
