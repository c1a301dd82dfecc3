"""Published folders that are damaged, incomplete or another family's: one line that names the file or the setting."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.core.tokenizers import load_tokenizer
from tests.checkpoints import test_eve, test_llava_hf

WEIGHTS, INDEX, PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny published EVE."""
    save_file(test_eve.random_state(test_eve.published_keys()), tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(test_eve.CONFIG))
    load_tokenizer("bytes").save_pretrained(tmp_path)
    return tmp_path


class Code:
    """What a pickle must not be allowed to run."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch ran",))


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def with_index(*names: str, weight_map: object = None) -> Callable[[Path], None]:
    """Shards that an index names; only the first is there."""

    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / names[0])
        places = dict.fromkeys(state, names[-1]) if weight_map is None else weight_map
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))

    return change


def lost_in_a_shard(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    with_index("model-1.safetensors")(folder)
    state.pop("lm_head.weight")
    save_file(state, folder / "model-1.safetensors")


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def pickled(content: object, cut: bool = False, plain: bool = False) -> Callable[[Path], None]:
    """A pickle instead of safetensors."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        file = folder / PICKLE
        file.write_bytes(pickle.dumps(content)) if plain else torch.save(content, file)
        if cut:
            file.write_bytes(file.read_bytes()[:-100])

    return change


def no_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def without(*keys: str) -> Callable[[Path], None]:
    """A configuration without these settings."""

    def change(folder: Path) -> None:
        kept = {key: value for key, value in test_eve.CONFIG.items() if key not in keys}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def config(text: str) -> Callable[[Path], None]:
    """A configuration file with this in it."""

    def change(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return change


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, r"model\.safetensors cannot be read: .*incomplete"),
    "empty": (empty, r"model\.safetensors cannot be read: "),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors and no pytorch_model.bin"),
    "a shard is missing": (
        with_index("model-1.safetensors", "model-2.safetensors"),
        "lacks model-2.safetensors, which",
    ),
    "a shard lacks a weight": (lost_in_a_shard, r"lack: lm_head.weight \(model-1.safetensors\)"),
    "no map": (with_index("model-1.safetensors", weight_map=[]), "index.json has no weight_map"),
    "half an index": (broken_index, "index.json is no JSON"),
    "code": (pickled({"a": Code()}), "pytorch_model.bin cannot be read: .*such as code"),
    "old code": (pickled({"a": Code()}, plain=True), "pytorch_model.bin cannot be read: .*such as code"),
    "a list": (pickled([1, 2]), "pytorch_model.bin is no file of weights: .* found list"),
    "half a pickle": (
        pickled({"a": torch.zeros(99)}, cut=True),
        "pytorch_model.bin cannot be read: its end is missing",
    ),
    "a pointer": (no_pickle, "pytorch_model.bin cannot be read: it is damaged"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "half a config": (config('{"a": '), "config.json is no JSON"),
    "a list as config": (config("[]"), "config.json holds list"),
    "no tokenizer": (no_tokenizer, "there is no tokenizer that can be read in"),
    "no sizes": (without("hidden_size", "num_attention_heads"), "config.json lacks hidden_size, num_attention_heads"),
    "llava": (config(json.dumps({"model_type": "llava"})), "model_type 'llava', which is the family llava-hf"),
    "hovle": (config(json.dumps({"model_type": "internvl_chat"})), "which is the family hovle or hovle_hd"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_folder_is_named(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    load_published("eve", folder)
    change, message = CHANGES[name]
    change(folder)
    with pytest.raises(ValueError, match=rf"{folder}, read as eve: .*{message}") as caught:
        load_published("eve", folder)
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder / "ran").exists()
    if name not in ("no sizes", "no tokenizer"):  # starting a stage reads weights alone
        with pytest.raises(ValueError, match=message):
            read_slots(f"eve:{folder}")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("hovle", {"embedding_config": "embedding", "llm_config": {}}, "embedding_config"),
        ("hovle", {}, "'embedding_config', which it needs"),
        ("vila", {"llm_cfg": "llm"}, "llm_cfg: expected the configuration of that part itself"),
        ("vila", {"mm_projector_type": None}, "mm_projector_type is ''"),
        ("llava-hf", {"vision_feature_layer": [1, 99]}, "layer 99 is not one of"),
        ("ola_vlm", {"num_task_tokens": 8}, "aux_mode"),
    ],
)
def test_a_configuration_that_does_not_say_enough_is_refused(family: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"the state dict, read as {family}: .*{message}"):
        load_published(family, {}, settings)


def test_a_word_table_is_the_output_layer_only_where_the_configuration_says_so() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    state = LlavaForConditionalGeneration(LlavaConfig(**test_llava_hf.CONFIG)).state_dict()
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm.lm_head.weight \(lm_head.weight\)"):
        load_published("llava-hf", state, test_llava_hf.CONFIG)
    tied = load_published("llava-hf", state, test_llava_hf.CONFIG | {"tie_word_embeddings": True})
    assert torch.equal(tied.decoder.logits(torch.eye(64)), state["model.language_model.embed_tokens.weight"].T)
