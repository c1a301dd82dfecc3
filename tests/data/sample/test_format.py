"""One picture, one set of pixels: whoever asks a model shows it what it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from lit_vlm.core.batch import PixelSpec
from lit_vlm.data import ChatML, SquareCrop, VLMData
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.evaluation.asker import Asker, Form
from tests.tiny import spec_of, tiny_vlm

HALF = (0.5, 0.5, 0.5)
TEACHERS = {"larger": PixelSpec(112, 14, HALF), "squashed": PixelSpec(56, 14, HALF, "squash")}


class AskedModel:
    """Of a LitVLM what those who ask look at."""

    device = torch.device("cpu")

    def __init__(self, spec: InputSpec) -> None:
        self.input_spec = spec


@pytest.fixture(scope="module")
def spec() -> InputSpec:
    return replace(spec_of(tiny_vlm()), teacher_pixels=TEACHERS)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    file = tmp_path / "large.jpg"
    PILImage.fromarray(noise).resize((1600, 1200), PILImage.Resampling.BICUBIC).save(file, quality=95)
    question = Message("user", (Image(path=str(file)), Text("what?")))
    return Record("1", "s", (question, Message("assistant", (Text("that"),))))


@pytest.mark.parametrize("fast_jpeg", [True, False])
def test_all_who_ask_see_the_pixels_of_training(spec: InputSpec, record: Record, fast_jpeg: bool) -> None:
    data = VLMData([], ChatML(), SquareCrop(), max_length=512, fast_jpeg=fast_jpeg)
    module = AskedModel(spec)
    trained = data.train_sample_encoder(spec)(record, Path("/")).images[0]
    held_out = data.sample_encoder(spec, prompt=True)(record, Path("/")).images[0]
    asker = Asker(module, data.format)  # type: ignore[arg-type]
    asked = [asker.encode([record], form)[0].images[0] for form in get_args(Form)]
    chat = asker.batch(asker.encode([record]))
    for seen in (held_out, *asked, next(chat.images.groups())[1][0]):
        assert torch.equal(seen, trained)


def test_it_matters(spec: InputSpec, record: Record) -> None:
    # Otherwise the test above would hold whatever is done: the other settings do give other pixels.
    def pixels(spec: InputSpec, fast_jpeg: bool) -> torch.Tensor:
        return SampleFormat(ChatML(), SquareCrop(), 512, fast_jpeg).sample_encoder(spec)(record, Path("/")).images[0]

    asked = spec.without_teachers()
    assert torch.equal(pixels(asked, True), pixels(spec, True))
    assert not torch.equal(pixels(spec, True), pixels(spec, False))
    assert not torch.equal(pixels(spec, True), pixels(replace(asked, decoded_for=()), True))
