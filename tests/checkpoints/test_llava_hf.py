from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published import FAMILIES, export_published, llava_hf
from lit_vlm.core.lora import Adapters, Lora, is_adapter
from lit_vlm.data import SquareCrop
from lit_vlm.encoders import HFEncoder
from tests.tiny import CLIP, LLAMA, batch_of, tiny_vlm

CONFIG = {
    "vision_config": CLIP | {"projection_dim": 16},
    "text_config": LLAMA | {"vocab_size": 300},
    "image_token_index": 299,
    "image_seq_length": 16,
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(**CONFIG)).state_dict()


def older_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the files on the hub, from before transformers 4.52."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("model.")
        key = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
        key = key.replace("language_model.", "language_model.model.", 1)
        renamed["language_model.lm_head.weight" if key == "lm_head.weight" else key] = value
    return renamed | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]}


def test_names_of_old_and_new_files_give_the_same_model(state) -> None:
    new, old = load_published("llava-hf", state, CONFIG), load_published("llava-hf", older_names(state), CONFIG)
    assert new.state_dict().keys() == old.state_dict().keys()
    for name, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[name])


def test_a_key_that_fits_nowhere_or_is_missing_is_an_error(state) -> None:
    with pytest.raises(ValueError, match="'model.image_newline' is no key of the family llava-hf"):
        load_published("llava-hf", state | {"model.image_newline": torch.zeros(1)}, CONFIG)
    name = "model.multi_modal_projector.linear_2.bias"
    with pytest.raises(ValueError, match=r"slot 'projector' \(MLP\): missing: layers.2.bias"):
        load_published("llava-hf", {key: value for key, value in state.items() if key != name}, CONFIG)
    with pytest.raises(ValueError, match="family: there is no 'nothing'; there are .*llava-hf"):
        load_published("nothing", state)
    with pytest.raises(ValueError, match="pass config as well"):
        load_published("llava-hf", state)


def test_what_a_stage_trained_comes_back_from_the_exported_folder(tmp_path: Path) -> None:
    lora = Lora(rank=2, alpha=4.0)
    model = tiny_vlm(lora=Adapters(encoder=lora, projector=lora, decoder=lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)
    batch = batch_of(model)
    before = model.logits(batch)
    assert export_published("llava-hf", model, tmp_path / "out", SquareCrop()) <= 1e-5
    again = load_published("llava-hf", tmp_path / "out")
    slots = read_slots(f"llava-hf:{tmp_path / 'out'}")
    found = {f"{slot}.{key}": value for slot, state in slots.items() for key, value in state.items()}
    assert found.keys() == again.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in again.state_dict().items())
    size = before.shape[-1]
    torch.testing.assert_close(again.logits(batch)[..., :size], before, atol=1e-4, rtol=1e-4)
    assert {"model.safetensors", "tokenizer.json", "processor_config.json"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    with pytest.raises(ValueError, match="is not empty"):
        FAMILIES["llava-hf"].export(again, tmp_path / "out")


def test_an_export_that_gives_other_logits_is_not_called_a_success(tmp_path: Path, monkeypatch) -> None:
    original = llava_hf._fill

    def broken(target, model) -> None:
        original(target, model)
        target.lm_head.weight.data[5] += 0.1

    monkeypatch.setattr(llava_hf, "_fill", broken)
    with pytest.raises(ValueError, match="logits differ by"):
        FAMILIES["llava-hf"].export(tiny_vlm(), tmp_path / "out")


def test_models_of_another_form_cannot_be_exported(tmp_path: Path) -> None:
    from lit_vlm.projectors import Resampler

    with pytest.raises(ValueError, match="this model is HFEncoder, Resampler, Splice, HFDecoder"):
        FAMILIES["llava-hf"].export(tiny_vlm(projector=Resampler), tmp_path / "out")


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("cls", [False, True])
def test_every_feature_layer_and_cls_choice_survives(layer: int, cls: bool, tmp_path: Path) -> None:
    model = tiny_vlm(encoder=partial(HFEncoder, config=CLIP, layer=layer, cls=cls))
    assert FAMILIES["llava-hf"].export(model, tmp_path / "out") <= 1e-5
