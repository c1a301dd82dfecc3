"""Adapters as a folder of PEFT: written, read back on their base, equal; and only on their base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from lit_vlm.core.fetch import _wanted
from lit_vlm.core.lora import is_adapter
from lit_vlm.core.safetensors import round_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.hf.adapters import export_adapters, load_adapted
from lit_vlm.hf.export import export_hf
from lit_vlm.training.module import LitVLM
from tests.exports import read
from tests.tiny import LLAMA

Read = tuple[LitVLM, dict[str, Any], SampleFormat]


def adapted(recipe: str, **lora: dict[str, Any]) -> Read:
    """A tiny model of a recipe with adapters that do something."""
    torch.manual_seed(0)
    module, config, written = read(recipe, lora=lora)
    with torch.no_grad():
        for name, parameter in module.vlm.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return module, config, written


def plain(recipe: str, folder: Path, like: LitVLM) -> None:
    """Export the model that adapters are on."""
    module, config, written = read(recipe)
    own, theirs = module.vlm.state_dict(), like.vlm.state_dict()
    module.vlm.load_state_dict({key: theirs.get(key, theirs.get(_below(key))) for key in own})
    export_hf(module.vlm, config, written, module.input_spec, folder)


def _below(key: str) -> str:
    """A weight's name under an adapter."""
    layer, _, kind = key.rpartition(".")
    return f"{layer}.base_layer.{kind}"


def write(read: Read, out: Path, base: Path | None = None) -> Any:
    module, config, written = read
    return export_adapters(module.vlm, config, written, module.input_spec, out, None if base is None else str(base))


RECIPES = {
    "llava15": {"encoder": {"rank": 2}, "projector": {"rank": 3}, "decoder": {"rank": 4, "alpha": 8.0}},
    "ola_vlm": {"decoder": {"rank": 4, "targets": ["q_proj", "v_proj"]}},
    "hovle": {"embedder": {"rank": 4}, "decoder": {"rank": 2, "dropout": 0.1}},
    "eve_v2": {"decoder": {"rank": 2}},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_adapters_are_read_back_on_the_base_that_is_written_beside_them(recipe: str, tmp_path: Path) -> None:
    ours = adapted(recipe, **RECIPES[recipe])
    found = write(ours, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    assert found.differences.logits <= 1e-5
    assert found.whole == ()
    own = {name: p for name, p in ours[0].vlm.named_parameters() if is_adapter(name)}
    assert found.parameters == sum(parameter.numel() for parameter in own.values())
    # PEFT itself reads them, without the kit's function, and they are no part of the base.
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "base", trust_remote_code=True)
    assert not any(is_adapter(name) for name in base.state_dict())
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    values = {name.partition("model.vlm.")[2]: p for name, p in theirs.named_parameters() if is_adapter(name)}
    assert values.keys() == own.keys()
    assert all(torch.equal(values[name], own[name]) for name in own)
    assert AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).chat_template


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_several_share_a_base_and_bring_what_it_has_otherwise(dtype: torch.dtype | None, tmp_path: Path) -> None:
    ours = adapted("llava15", decoder={"rank": 4})
    plain("llava15", tmp_path / "base", ours[0])
    if dtype is not None:
        round_folder(tmp_path / "base", dtype)
    assert write(ours, tmp_path / "same", tmp_path / "base").whole == ()
    with torch.no_grad():
        for parameter in ours[0].vlm.projector.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    found = write(ours, tmp_path / "other", tmp_path / "base")
    assert found.whole == ("projector",)
    assert found.differences.logits <= 1e-5
    assert not (tmp_path / "other" / "base").exists()
    trained = {name for name, p in load_adapted(tmp_path / "other").named_parameters() if p.requires_grad}
    assert {"projector" in name or is_adapter(name) for name in trained} == {True}


def test_another_base_is_refused(tmp_path: Path) -> None:
    ours = adapted("llava15", decoder={"rank": 4})
    write(ours, tmp_path / "out")
    module, config, written = read("llava15")
    with torch.no_grad():
        for parameter in module.vlm.decoder.parameters():
            parameter.add_(0.1)
    export_hf(module.vlm, config, written, module.input_spec, tmp_path / "another")
    with pytest.raises(ValueError, match="another is not the base of .*out: its weights are others than"):
        load_adapted(tmp_path / "out", str(tmp_path / "another"))
    with pytest.raises(ValueError, match=r"other weights under the adapters of decoder\.lm\."):
        write(ours, tmp_path / "on_another", tmp_path / "another")
    module, config, written = read("ola_vlm")
    export_hf(module.vlm, config, written, module.input_spec, tmp_path / "parts")
    with pytest.raises(ValueError, match="has other parts in the slot 'embedder' than this run"):
        write(ours, tmp_path / "on_parts", tmp_path / "parts")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no config\.json"):
        write(ours, tmp_path / "on_empty", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="is no folder that `lit-vlm export --format hf` wrote"):
        write(ours, tmp_path / "on_llava", tmp_path / "empty")
    shutil.rmtree(tmp_path / "out" / "base")
    with pytest.raises(ValueError, match="the base of .*out is not there"):
        load_adapted(tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", "another", "parts", "empty"}


def test_a_base_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = adapted("llava15", decoder={"rank": 4})
    plain("llava15", tmp_path / "base", ours[0])
    monkeypatch.chdir(tmp_path)
    write(ours, Path("out"), Path("base"))
    assert json.loads(Path("out/base.json").read_text())["base"] == str(tmp_path / "base")
    monkeypatch.chdir("/")
    load_adapted(tmp_path / "out")
    # The same weights in parts of other settings are another base.
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["slots"]["decoder"]["init_args"]["config"]["rms_norm_eps"] = 0.5
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base is not the base of .*out: its parts are others"):
        load_adapted(tmp_path / "out")


def test_code_in_the_folder_of_a_base_is_not_run(tmp_path: Path) -> None:
    ours = adapted("llava15", decoder={"rank": 4})
    plain("llava15", tmp_path / "base", ours[0])
    stub = tmp_path / "base" / "modeling_lit_vlm.py"
    stub.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{stub.read_text()}")
    write(ours, tmp_path / "out", tmp_path / "base")
    load_adapted(tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_base_and_its_adapters_are_read_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it has all that is asked for
    ours = adapted("llava15", decoder={"rank": 4})
    plain("llava15", tmp_path / "base", ours[0])
    to_hub_cache(tmp_path / "base", tmp_path / "hub" / "models--lab--base", ("",))
    write(ours, tmp_path / "out", Path("lab/base"))
    assert json.loads((tmp_path / "out" / "base.json").read_text())["base"] == "lab/base"
    load_adapted(tmp_path / "out")
    write(ours, tmp_path / "both")
    to_hub_cache(tmp_path / "both", tmp_path / "hub" / "models--lab--both", ("", "base"))
    load_adapted("lab/both")


def to_hub_cache(source: Path, repository: Path, folders: tuple[str, ...]) -> None:
    """Put into a hub cache what would be fetched of a folder that lies on the hub."""
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    there = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
    for file in _wanted(there, True, folders):
        target = repository / "snapshots" / "abc" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, target)


def test_what_trained_beside_adapters_is_written_whole(tmp_path: Path) -> None:
    arguments = {"config": LLAMA, "tokenizer": "bytes", "new_tokens": ["<here>"]}
    tokens = {"class_path": "lit_vlm.decoders.HFDecoder", "init_args": arguments}
    module, config, written = read("llava15", decoder=tokens, lora={"decoder": {"rank": 2}})
    base, base_config, base_format = read("llava15", decoder=tokens)
    state = module.vlm.state_dict()
    base.vlm.load_state_dict({key: state.get(key, state.get(_below(key))) for key in base.vlm.state_dict()})
    export_hf(base.vlm, base_config, base_format, base.input_spec, tmp_path / "base")
    with torch.no_grad():
        for parameter in module.vlm.decoder.beside_adapters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    found = write((module, config, written), tmp_path / "out", tmp_path / "base")
    assert sorted(found.whole) == ["decoder.lm.lm_head", "decoder.lm.model.embed_tokens"]
    assert found.differences.logits <= 1e-5


def test_adapters_on_rounded_weights_bring_their_base(tmp_path: Path) -> None:
    module, config, written = adapted("llava15", decoder={"rank": 2})
    plain("llava15", tmp_path / "base", module)
    config["model"]["quantize"] = {"decoder": "int8", "encoder": None}
    with pytest.raises(ValueError, match=r"were rounded \(model\.quantize: \{'decoder': 'int8'\}\).*leave --base out"):
        write((module, config, written), tmp_path / "out", tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text()) | {"quantise": {"decoder": "int8"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    del config["model"]["quantize"]
    with pytest.raises(ValueError, match="has weights in fewer bits"):
        write((module, config, written), tmp_path / "out", tmp_path / "base")


def test_a_run_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this run has no adapters"):
        write(read("llava15"), tmp_path / "out")
