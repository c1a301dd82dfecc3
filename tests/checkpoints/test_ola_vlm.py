"""OLA-VLM: published names in and out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_vlm.checkpoints import load_published
from lit_vlm.checkpoints.published.ola_vlm import NAMES, OlaVlm, own_predictor_key
from lit_vlm.core.part import meta_parameters
from lit_vlm.data import ChatML, PadSquare
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder, TimmEncoder
from lit_vlm.heads import EmbeddingDistillation
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP
from tests.heads.test_embedding_distillation import FIXTURE, Fixed
from tests.tiny import PHI3, tiny_decoder, tiny_slots

SPLICE = partial(Splice, task_tokens={"gen": 2, "depth": 2, "seg": 2}, pooled_from={"depth": 4, "seg": 4})
HEADS = {
    "gen": partial(EmbeddingDistillation, teacher=Fixed, layers=[1, 3], tokens="gen", queries="states", num_targets=1),
    "depth": partial(EmbeddingDistillation, teacher=Fixed, layers=[1, 2], tokens="depth", num_targets=4),
    "seg": partial(EmbeddingDistillation, teacher=Fixed, layers=[2, 3], tokens="seg", num_targets=4, inner_width=48),
}
FORMS = {
    "llama": tiny_decoder(),
    "phi3": partial(HFDecoder, config=PHI3, tokenizer="bytes"),
}


def model_of(form: str, heads: bool = True, convolutional: bool = False) -> VLM:
    """A tiny OLA-VLM."""
    encoder = {"encoder": partial(TimmEncoder, "convnext_atto", None, image_size=64)} if convolutional else {}
    slots = tiny_slots(embedder=SPLICE, decoder=FORMS[form], heads=HEADS if heads else {}, **encoder)
    return build(slots).eval()


def test_published_predictors_have_the_names_and_shapes_of_the_fixture() -> None:
    model = model_of("llama")
    head = model.heads["depth"]
    names = {
        NAMES.published("heads.depth", name).removeprefix("image_depth_heads.0.")
        for name in head.state_dict()
        if name.startswith("predictors.0.")
    }
    assert names == set(FIXTURE["B_state_keys"]["depth_no_inter"])
    assert NAMES.published("heads.depth", "logit_scale") == "depth_logit_scale"
    for key in FIXTURE["B_state_keys"]["depth_no_inter"]:
        slots = NAMES.slots_of({f"image_depth_heads.1.{key}": torch.zeros(1)}, {})
        own = next(iter(slots["heads.depth"]))
        assert own == f"predictors.1.{own_predictor_key(key.removeprefix('projector.'))}"
        assert NAMES.published("heads.depth", own) == f"image_depth_heads.1.{key}"


def test_the_published_numbers_of_parameters() -> None:
    # Fact: parameters of the predictors of the files with Llama-3, by task.
    with meta_parameters():
        tasks = {
            "depth": (576, None, 1024, 56_654_848),
            "seg": (576, 1536, 1536, 14_171_136),
            "gen": (1, 1024, 1024, 7_874_560),
        }
        for task, (count, inner, width, expected) in tasks.items():
            teacher = Fixed()
            teacher.width = width
            head = EmbeddingDistillation(
                4096, 32, lambda teacher=teacher: teacher, [8], count, task, "parameters", inner
            )
            assert sum(p.numel() for p in head.predictors.parameters()) == expected
        splice = Splice(4096, 128257, {"gen": 8, "depth": 8, "seg": 8}, {"depth": 576, "seg": 576})
        published = {NAMES.published("embedder", name): tuple(p.shape) for name, p in splice.named_parameters()}
        assert published == {
            "model.special_gen_tokens": (8, 4096),
            "model.special_depth_tokens": (576, 4096),
            "model.special_seg_tokens": (576, 4096),
        }


@pytest.mark.parametrize("convolutional", [False, True], ids=["clip", "convnext"])
@pytest.mark.parametrize("heads", [True, False], ids=["after PT", "after IFT"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_exported_is_read_back(form: str, heads: bool, convolutional: bool, tmp_path: Path) -> None:
    model = model_of(form, heads, convolutional)
    assert OlaVlm().export(model, tmp_path / "out", SampleFormat(ChatML(), PadSquare(), 512, True)) <= 1e-5
    keys = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {"model.mm_projector.2.bias", "model.special_seg_tokens", "model.embed_tokens.weight"} <= keys
    tower = "stages.0.blocks.0.gamma" if convolutional else "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert f"model.vision_tower.vision_tower.{tower}" in keys
    assert ("image_gen_heads.1.projector.layers.0.0.to_kv.weight" in keys) == heads
    assert ("gen_logit_scale" in keys) == heads
    assert not heads or load_file(tmp_path / "out" / "model.safetensors")["gen_logit_scale"].shape == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    places = {"img": "image_gen", "depth": "image_depth", "seg": "image_seg"}
    for short, name in places.items() if heads else ():
        assert set(config[name][f"{short}_layer_indices"].split("-")) <= {"1", "2", "3", "4"}
    assert (config.get("image_depth", {}).get("use_intermediate_depth") is False) == heads
    loaded = load_published("ola_vlm", tmp_path / "out")
    assert list(loaded.embedder.task_tokens) == ["gen", "depth", "seg"]
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    slots = OlaVlm().read(str(tmp_path / "out"))
    for name, head in model.heads.items():
        assert slots[f"heads.{name}"].keys() == head.state_dict().keys()


def test_a_whole_vision_tower_is_cut_to_the_layer_that_is_read(tmp_path: Path) -> None:
    model = model_of("llama", heads=False)
    assert isinstance(model.encoder, HFEncoder)
    OlaVlm().export(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    prefix = "model.vision_tower.vision_tower.vision_model."
    last = {key: value for key, value in state.items() if key.startswith(f"{prefix}encoder.layers.1.")}
    state |= {key.replace("layers.1.", "layers.2."): value.clone() for key, value in last.items()}
    state[f"{prefix}post_layernorm.weight"] = torch.ones(32)
    state["da_v2_head.depth_head.scratch.output_conv1.bias"] = torch.ones(1)
    save_file(state, file)
    loaded = load_published("ola_vlm", tmp_path / "out")
    assert loaded.encoder.state_dict().keys() == model.encoder.state_dict().keys()


def test_the_published_convnext_has_a_norm_that_nothing_reads(tmp_path: Path) -> None:
    # Fact: 378 tensors of 843,398,016 numbers, the trunk of CLIP's ConvNeXt-XXL without its classifier.
    prefix = "model.vision_tower.vision_tower."
    with meta_parameters():
        trunk = timm.create_model("convnext_xxlarge.clip_laion2b_soup", num_classes=0).state_dict()
        encoder = TimmEncoder("convnext_xxlarge.clip_laion2b_soup", None, image_size=768)
    assert (len(trunk), sum(value.numel() for value in trunk.values())) == (378, 843_398_016)
    slots = NAMES.slots_of({f"{prefix}{key}": value for key, value in trunk.items()}, {})
    own = {name: value.shape for name, value in encoder.state_dict().items()}
    assert {name: value.shape for name, value in slots["encoder"].items()} == own
    model = model_of("llama", heads=False, convolutional=True)
    OlaVlm().export(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file) | {f"{prefix}head.norm.{kind}": torch.ones(320) for kind in ("weight", "bias")}, file)
    loaded = load_published("ola_vlm", tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def without_depth(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    del state["model.special_depth_tokens"]


def without_a_block(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key in [key for key in state if "vision_model.encoder.layers.1." in key]:
        del state[key]


def with_fewer_parameters(state: dict[str, Tensor], config: dict[str, Any]) -> None:
    state["model.special_seg_tokens"] = state["model.special_seg_tokens"][:2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_depth, "there is no model.special_depth_tokens, and aux_mode is gen-depth-seg"),
        (lambda _s, c: c.update(aux_mode="gen-seg"), "there is model.special_depth_tokens, and aux_mode is gen-seg"),
        (lambda _s, c: c.pop("aux_mode"), "'aux_mode', which it needs"),
        (lambda _s, c: c.update(aux_mode="gen-pose"), r"aux_mode names \['pose'\]"),
        (lambda _s, c: c.update(num_task_tokens=0), "model.special_.*_tokens.*does not say how many: num_task_tokens"),
        (lambda _s, c: c.update(num_task_tokens=4), r"model.special_gen_tokens is \(2, 64\), not of num_task_tokens 4"),
        (lambda _s, c: c.update(task_token_format="emb"), "task_token_format is 'emb', and only expand_emb"),
        (with_fewer_parameters, r"model.special_seg_tokens is \(2, 64\), not of image_seg.num_tokens 4"),
        (without_a_block, r"no 'model.vision_tower.*encoder.layers.1.': config.json asks for 2 blocks"),
    ],
)
def test_groups_of_weights_do_not_come_and_go_in_silence(change: Any, message: str, tmp_path: Path) -> None:
    OlaVlm().export(model_of("llama", heads=False), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    change(state, config)
    with pytest.raises(ValueError, match=message):
        load_published("ola_vlm", state, config)


def test_keys_that_belong_nowhere_and_models_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'image_pose_heads.0.x' is no key of the family ola_vlm"):
        NAMES.slots_of({"image_pose_heads.0.x": torch.zeros(1)}, {})
    slots = tiny_slots(projector=partial(MLP, depth=1))
    with pytest.raises(ValueError, match="ola_vlm is TimmEncoder, or HFEncoder, .* MLP of depth 2"):
        OlaVlm().export(build(slots).eval(), tmp_path / "out")
    levels = tiny_slots(encoder=partial(TimmEncoder, "test_vit", None, [1, 3]))
    with pytest.raises(ValueError, match="ola_vlm is TimmEncoder, or HFEncoder, read at one layer"):
        OlaVlm().export(build(levels).eval(), tmp_path / "out")
