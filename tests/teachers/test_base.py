"""Teachers are read when the model is built, only those that are asked, and a missing file is named before."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from lit_vlm.core.pretrained import find_weights
from lit_vlm.data import VLMData
from lit_vlm.encoders import S2, Ensemble, HFEncoder, TimmEncoder
from lit_vlm.heads import FeatureDistillation
from lit_vlm.model.build import build_on_meta
from lit_vlm.teachers import EncoderTeacher, HFVision
from tests.callbacks.test_callbacks import data, lit, trainer
from tests.tiny import CLIP, tiny_slots


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder with a tiny CLIP."""
    folder = tmp_path / "clip"
    settings = {key: value for key, value in CLIP.items() if key != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**settings)).save_pretrained(folder)
    return folder


def teacher_of(module: Any) -> EncoderTeacher:
    teacher = module.vlm.heads["own"].teacher
    assert isinstance(teacher, EncoderTeacher)
    return teacher


def with_teacher(source: Path | str, weight: float = 1.0) -> Any:
    module = lit(train={"projector": 1e-3}, losses={"next_token": 1.0, "own": weight})
    module.slots.heads = {"own": partial(FeatureDistillation, teacher=partial(HFVision, str(source)))}
    return module


class Stop(Exception):
    """Ends a run before its first step."""


def built(module: Any, folder: Path, **changes: Any) -> EncoderTeacher:
    """The teacher when training would begin."""

    def stop(*_: Any) -> None:
        raise Stop

    module.on_train_start = stop
    made: VLMData = data()
    made.prepared = changes
    with pytest.raises(Stop):
        trainer(folder).fit(module, made)
    return teacher_of(module)


def loaded(teacher: EncoderTeacher) -> bool:
    return not any(p.is_meta for p in teacher.encoder.parameters())


@pytest.mark.filterwarnings("ignore")
def test_it_is_read_when_the_model_is_built_where_it_will_be_asked(clip: Path, tmp_path: Path) -> None:
    teacher = built(with_teacher(clip), tmp_path)
    expected = HFEncoder(str(clip)).pretrained_state()
    assert expected is not None
    for key, value in teacher.encoder.state_dict().items():
        torch.testing.assert_close(value, expected[key])
    assert not loaded(built(with_teacher(clip, weight=0.0), tmp_path))
    assert not loaded(
        built(with_teacher(clip), tmp_path, own=SimpleNamespace(check=lambda *_: None))
    )  # features were prepared


@pytest.mark.filterwarnings("ignore")
def test_a_missing_file_ends_the_run_before_its_first_step(clip: Path, tmp_path: Path) -> None:
    (clip / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.heads.own.teacher: .*clip"):
        built(with_teacher(clip), tmp_path)
    head = build_on_meta(tiny_slots(heads=with_teacher(clip).slots.heads)).heads["own"]
    with pytest.raises(ValueError, match=rf"there are no weights at {clip}: no file ends in .safetensors"):
        head.teacher.find_pretrained()  # type: ignore[union-attr]


def test_weights_are_looked_for_without_reading_them(clip: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (clip / "model.safetensors").write_bytes(b"")  # nobody opens it
    teachers = [
        HFVision(str(clip)),
        EncoderTeacher(partial(S2, partial(HFEncoder, str(clip)))),
        EncoderTeacher(partial(Ensemble, [partial(HFEncoder, config=CLIP), partial(HFEncoder, str(clip))])),
        EncoderTeacher(partial(TimmEncoder, "test_vit", None)),
    ]
    for teacher in teachers:
        teacher.find_pretrained()
    (clip / "model.safetensors").unlink()
    for teacher in teachers[:3]:
        with pytest.raises(ValueError, match="there are no weights at"):
            teacher.find_pretrained()
    with pytest.raises(ValueError, match=r"there are no weights at .*none.pth"):
        EncoderTeacher(partial(TimmEncoder, "test_vit", str(tmp_path / "none.pth"))).find_pretrained()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    (clip / "model-1.safetensors").touch()
    with pytest.raises(ValueError, match=r"index.json names model-2.safetensors, missing in that folder"):
        find_weights(str(clip))


def test_sources_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_weights("made:scenes-encoder")
    with pytest.raises(ValueError, match="there is no part 'made:gone'"):
        find_weights("made:gone")
    with pytest.raises(ValueError, match="the package 'no_such_package' that carries these weights"):
        find_weights("package:no_such_package")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the weights of some/model are not in the hub cache, and the hub does not"):
        find_weights("some/model")
