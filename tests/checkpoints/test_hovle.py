"""HoVLE: published names in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published.hovle import BASE, HD, Hovle
from lit_vlm.core.part import meta_parameters
from lit_vlm.data import ChatML, Tiles
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder, internlm2
from lit_vlm.decoders.hf import read_folder
from lit_vlm.embedders import Holistic
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Identity, PatchMerge
from tests.embedders.test_holistic import FULL, TOY, model_of
from tests.tiny import LLAMA, ROOT, tiny_slots

KEYS = json.loads((ROOT / "tests" / "fixtures" / "hovle_keys.json").read_text())
FAMILIES = {"hovle": BASE, "hovle_hd": HD}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_all_published_keys_have_a_place_and_nothing_is_left_over(family: Hovle) -> None:
    with meta_parameters():
        decoder = HFDecoder(
            config={"vocab_size": 92553, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                    "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False},
        )  # fmt: skip
        projector = (Identity if family.hd else PatchMerge)(2048, 2048)
        embedder = Holistic(2048, 92553, merge=2 if family.hd else 1)
        model = VLM(ConvPatches(), projector, embedder, decoder)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    config = {"embedding_config": heads, "llm_config": heads}
    state = {
        family.names.published(*key.split(".", 1)): torch.empty(value.shape, device="meta")
        for key, value in model.state_dict().items()
    }
    written = {key: list(value.shape) for key, value in family.names.join(state, config).items()}
    assert written == KEYS["keys"]
    published = {key: torch.empty(shape, device="meta") for key, shape in KEYS["keys"].items()}
    slots = family.names.slots_of(published, config)
    read = {f"{slot}.{name}": value.shape for slot, state in slots.items() for name, value in state.items()}
    assert read == {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_is_read_back(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert FAMILIES[name].export(model, tmp_path / "out", SampleFormat(ChatML(), Tiles(max_tiles=3), 512, True)) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_dynamic_patch"], config["use_thumbnail"]) == (3, True)
    other = "hovle" if name == "hovle_hd" else "hovle_hd"
    with pytest.raises(ValueError, match=f"load it as '{name}'"):
        load_published(other, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{other} is ConvPatches"):
        FAMILIES[other].export(model, tmp_path / "other")
    slots = FAMILIES[name].read(str(tmp_path / "out"))
    again = build(
        tiny_slots(
            encoder=lambda: ConvPatches(64, 28, 7),
            projector=type(model.projector),
            embedder=lambda w, v: Holistic(w, v, 2, 4, 2, 128, merge=model.embedder.merge),  # type: ignore[arg-type]
        ),
        read_slots(f"{name}:{tmp_path / 'out'}"),
    )
    assert slots.keys() >= {"encoder", "embedder", "decoder"}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special_token_maps": {"<quad>": 1}}, "special_token_maps is"),
        ({"normalize_encoder_output": True}, "normalize_encoder_output is True"),
    ],
)
def test_what_the_model_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {"embedding_config": TOY | changes, "llm_config": FULL["llm_config"]}
    with pytest.raises(ValueError, match=message):
        load_published("hovle", FULL["state_dict"], config)


def test_special_tokens_are_the_reason_and_not_their_key() -> None:
    state = FULL["state_dict"] | {"embedding_model.special_text_embeddings.weight": torch.zeros(1, 64)}
    config = {"embedding_config": TOY | {"special_token_maps": {"<quad>": 1}}, "llm_config": FULL["llm_config"]}
    with pytest.raises(ValueError, match="read as hovle: config.json: special_token_maps is {'<quad>': 1}"):
        load_published("hovle", state, config)


def test_a_setting_that_is_absent_is_named() -> None:
    short = {key: value for key, value in TOY.items() if key != "num_key_value_heads"}
    for config, message in (
        ({"embedding_config": short, "llm_config": FULL["llm_config"]}, "have 'num_key_value_heads', which"),
        ({"llm_config": FULL["llm_config"]}, "have 'embedding_config', which"),
    ):
        with pytest.raises(ValueError, match=message):
            load_published("hovle", FULL["state_dict"], config)


def test_a_key_that_belongs_nowhere_is_named() -> None:
    config = {"embedding_config": TOY, "llm_config": FULL["llm_config"]}
    with pytest.raises(ValueError, match=r"'vision_model\.x' is no key of the family hovle"):
        load_published("hovle", FULL["state_dict"] | {"vision_model.x": torch.zeros(1)}, config)


def test_internlm2_is_read_as_the_llama_that_it_is(tmp_path: Path) -> None:
    plain = build(tiny_slots()).decoder
    assert isinstance(plain, HFDecoder)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = {internlm2.from_llama(key): value for key, value in plain.lm.state_dict().items()}
    theirs = {own: name for name, own in internlm2.TOP.items()}
    for own, name in theirs.items():
        llama = {name + key.removeprefix(own) if key.startswith(own) else key: value for key, value in llama.items()}
    save_file(internlm2.fuse_qkv(llama, heads), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.attention.wqkv.weight" in load_file(tmp_path / "model.safetensors")
    config = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"model_type": "internlm2"}
    config |= {"vocab_size": plain.vocab_size, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
    config |= {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = build(tiny_slots(decoder=lambda: HFDecoder(name=str(tmp_path), tokenizer="bytes"))).decoder
    assert read_folder(str(tmp_path)).keys() != decoder.state_dict().keys()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in decoder.state_dict().items())
    embeds, positions = torch.randn(1, 5, 64), torch.arange(5)[None]
    torch.testing.assert_close(decoder(embeds, positions).hidden, plain(embeds, positions).hidden)
