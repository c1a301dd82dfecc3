"""VILA's published names, both layouts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published import export_published
from lit_vlm.checkpoints.published.layout import trial_batch
from lit_vlm.data import ChatML, Resize
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.encoders import S2, HFEncoder
from lit_vlm.projectors import MLP, Downsample, Downsample3x3, Linear, Resampler
from tests.tiny import CLIP, LLAMA, tiny_vlm

SIGLIP = CLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 4}
LLM = LLAMA | {"vocab_size": 300}
PROJECTORS: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "linear": (1, {"layers.weight": (64, 32), "layers.bias": (64,)}),
    "mlp2x_gelu": (1, {
        "layers.0.weight": (64, 32), "layers.0.bias": (64,), "layers.2.weight": (64, 64), "layers.2.bias": (64,),
    }),
    "mlp_downsample": (4, {
        "layers.1.weight": (128,), "layers.1.bias": (128,), "layers.2.weight": (64, 128), "layers.2.bias": (64,),
        "layers.4.weight": (64, 64), "layers.4.bias": (64,),
    }),
}  # fmt: skip


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def vision(config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    cls = SiglipVisionConfig if config["model_type"].startswith("siglip") else CLIPVisionConfig
    model = AutoModel.from_config(cls(**{k: v for k, v in config.items() if k != "model_type"}))
    # Files are from before transformers 5, which leaves this prefix out.
    return {
        key if key.startswith("vision_model.") else f"vision_model.{key}": v for key, v in model.state_dict().items()
    }


def llm() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**LLM)).state_dict()


def parts(kind: str) -> dict[str, dict[str, Tensor]]:
    return {"llm": llm(), "vision_tower": vision(SIGLIP), "mm_projector": random_state(PROJECTORS[kind][1])}


def config_of(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "llm_cfg": LLM,
        "vision_tower_cfg": SIGLIP,
        "mm_projector_cfg": {"mm_projector_type": kind},
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        **more,
    }


def in_memory(kind: str) -> dict[str, Tensor]:
    prefix = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}
    return {f"{prefix[part]}{key}": value for part, state in parts(kind).items() for key, value in state.items()}


def write(folder: Path, kind: str) -> Path:
    config = config_of(kind)
    (folder / "config.json").write_text(json.dumps(config))
    for part, key in (("llm", "llm_cfg"), ("vision_tower", "vision_tower_cfg"), ("mm_projector", "mm_projector_cfg")):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config[key]))
        save_file({k: v.contiguous() for k, v in parts(kind)[part].items()}, folder / part / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", PROJECTORS)
def test_the_three_folders_and_the_names_in_memory_give_the_same_model(kind: str, tmp_path: Path) -> None:
    model = load_published("vila", in_memory(kind), config_of(kind))
    slots = read_slots(f"vila:{write(tmp_path, kind)}")
    for slot, state in slots.items():
        own = getattr(model, slot).state_dict()
        assert own.keys() == state.keys()
        for name, value in own.items():
            assert torch.equal(value, state[name])
    assert isinstance(model.encoder, HFEncoder)
    assert len(list(model.encoder.blocks())) == 3  # layer −2 of four blocks
    assert isinstance(model.projector, {"linear": Linear, "mlp2x_gelu": MLP, "mlp_downsample": Downsample}[kind])
    if isinstance(model.projector, Downsample):
        assert model.projector.token_order == "col"


def test_a_vision_tower_that_transformers_5_saved_loads(tmp_path: Path) -> None:
    folder = write(tmp_path, "mlp_downsample")
    saved = parts("mlp_downsample")["vision_tower"]
    state = {key.removeprefix("vision_model."): value.contiguous() for key, value in saved.items()}
    assert "head.probe" in state
    save_file(state, folder / "vision_tower" / "model.safetensors")
    assert read_slots(f"vila:{folder}")["encoder"].keys() == load_published(
        "vila", in_memory("mlp_downsample"), config_of("mlp_downsample")
    ).encoder.state_dict().keys()  # fmt: skip


def flat() -> tuple[dict[str, Tensor], dict[str, Any]]:
    projector = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    state = llm() | {f"model.vision_tower.vision_tower.{key}": value for key, value in vision(CLIP).items()}
    state |= {f"model.mm_projector.{key}": value for key, value in random_state(projector).items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(1)
    config = LLM | {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    return state, config | {"mm_vision_select_feature": "patch", "vision_config": CLIP}


def test_a_flat_file_of_release_one_loads() -> None:
    state, config = flat()
    model = load_published("vila", state, config)
    assert torch.equal(model.projector.state_dict()["layers.2.weight"], state["model.mm_projector.2.weight"])
    assert torch.equal(model.decoder.state_dict()["lm.lm_head.weight"], state["lm_head.weight"])
    assert model.logits(trial_batch(model)).isfinite().all()


def test_what_fits_nowhere_is_missing_or_unknown_is_an_error(tmp_path: Path) -> None:
    state, config = flat()
    with pytest.raises(ValueError, match=r"'image_newline' is no key of the family vila"):
        load_published("vila", state | {"image_newline": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"missing: layers.2.bias"):
        load_published("vila", {k: v for k, v in state.items() if k != "model.mm_projector.2.bias"}, config)
    with pytest.raises(ValueError, match="mm_projector_type is 'resampler'"):
        load_published("vila", state, config | {"mm_projector_type": "resampler"})
    with pytest.raises(ValueError, match="cls_patch of a vision model with CLS token"):
        load_published("vila", state, config | {"mm_vision_select_feature": "cls_patch"})
    with pytest.raises(ValueError, match="pass config as well"):
        load_published("vila", state)
    folder = write(tmp_path, "linear")
    for file in (folder / "mm_projector").iterdir():
        file.unlink()
    (folder / "mm_projector").rmdir()
    with pytest.raises(ValueError, match="no mm_projector/"):
        load_published("vila", folder)


@pytest.mark.parametrize(
    ("encoder", "projector"),
    [
        (partial(HFEncoder, config=CLIP), partial(MLP, depth=2)),
        (partial(HFEncoder, config=SIGLIP), partial(Downsample, token_order="col")),
        (partial(HFEncoder, config=SIGLIP), Downsample),
        (partial(HFEncoder, config=SIGLIP), Downsample3x3),
        (partial(S2, partial(HFEncoder, config=SIGLIP)), partial(Downsample, token_order="col")),
        (partial(HFEncoder, config=CLIP), Linear),
    ],
    ids=["mlp", "column order", "row order", "3x3", "s2", "linear"],
)
def test_exported_folders_come_back(encoder: Any, projector: Any, tmp_path: Path) -> None:
    model = tiny_vlm(encoder=encoder, projector=projector)
    assert export_published("vila", model, tmp_path / "out", SampleFormat(ChatML(), Resize(), 512, True)) <= 1e-5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "llm",
        "vision_tower",
        "mm_projector",
    }
    again = load_published("vila", tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    # What VILA's own loader reads besides weights.
    tower = json.loads((tmp_path / "out" / "vision_tower" / "config.json").read_text())
    inner = model.encoder.inner if isinstance(model.encoder, S2) else model.encoder
    clip = inner.config.model_type == "clip_vision_model"
    assert tower["architectures"] == ["CLIPVisionModel" if clip else "SiglipVisionModel"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "vision_tower")
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    side = inner.pixels.size
    assert processor(picture, return_tensors="pt").pixel_values.shape == (1, 3, side, side)
    with pytest.raises(ValueError, match="is not empty"):
        export_published("vila", model, tmp_path / "out", None)


def test_a_model_of_another_form_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model is HFEncoder, Resampler, Splice, HFDecoder"):
        export_published("vila", tiny_vlm(projector=Resampler), tmp_path / "out", None)
