"""The text part of multimodal checkpoints as a decoder, beyond the table of docs/decoders.md."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_vlm.core.pretrained import made_config
from lit_vlm.decoders import DivideAndConquer, HFDecoder, check_order
from lit_vlm.model.build import build
from tests.decoders.wrappers import saved
from tests.tiny import tiny_slots

IDS = torch.tensor([[5, 9, 200, 3, 17]])
POSITIONS = torch.arange(5)[None]


def test_a_model_is_built_around_the_text_part(tmp_path: Path) -> None:
    whole = saved("qwen3_vl", tmp_path, tied=True)
    decoder = partial(HFDecoder, name=str(tmp_path), tokenizer="bytes", new_tokens=("<|start|>",))
    model = build(tiny_slots(decoder=decoder)).eval()
    with torch.no_grad():
        found = model.decoder.logits(model.decoder(model.decoder.embed(IDS), POSITIONS).hidden)
        expected = whole(input_ids=IDS).logits
    torch.testing.assert_close(found[..., :259], expected[..., :259], atol=1e-5, rtol=1e-5)
    check_order(model.decoder, packed=True, device=torch.device("cpu"))
    assert isinstance(model.decoder, HFDecoder)
    kept = model.decoder.standalone({"name": str(tmp_path), "config": None})
    assert made_config(kept["config"]["model_type"], kept["config"], "decoder").model_type == "qwen3"


def test_its_blocks_are_split_for_image_tokens(tmp_path: Path) -> None:
    saved("qwen2_5_vl", tmp_path, tied=False)
    model = build(tiny_slots(decoder=partial(DivideAndConquer, name=str(tmp_path), tokenizer="bytes")))
    state = model.decoder.state_dict()
    vision = [key for key in state if ".vision." in key]
    assert vision
    assert all(torch.equal(state[key], state[key.replace(".vision.", ".text.")]) for key in vision)


def test_weights_that_its_files_lack_are_named(tmp_path: Path) -> None:
    saved("gemma3", tmp_path, tied=False)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    lost = [
        key for key in state if key.endswith(("layers.1.self_attn.q_proj.weight", "vision_tower.post_layernorm.bias"))
    ]
    assert lost
    save_file({key: value for key, value in state.items() if key not in lost}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.1.self_attn.q_proj.weight \(missing\): name"):
        HFDecoder(name=str(tmp_path), tokenizer="bytes").pretrained_state()


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    saved("gemma3", tmp_path, tied=False)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings["text_config"]["intermediate_size"] = 32
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight \(\(64, 64\) instead of \(64, 32\)\)"):
        HFDecoder(name=str(tmp_path), tokenizer="bytes").pretrained_state()


def test_a_text_part_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    saved("mllama", tmp_path, tied=False)
    with pytest.raises(
        ValueError, match="is a 'mllama', whose text part, a 'mllama_text_model', is no causal language"
    ):
        HFDecoder(name=str(tmp_path), tokenizer="bytes")
