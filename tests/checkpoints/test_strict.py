"""Every published family: a key that is lost, unknown or of another shape is refused by its name."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from lit_vlm.checkpoints import load_published
from lit_vlm.checkpoints.published import FAMILIES
from lit_vlm.core.safetensors import read_folder, read_json
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from tests.checkpoints import (
    test_eve,
    test_fuyu,
    test_llava_hf,
    test_llava_next,
    test_mono_internvl,
    test_ola_vlm,
    test_vila,
)
from tests.embedders.test_holistic import model_of as hovle_model
from tests.tiny import tiny_slots

Published = tuple[dict[str, Tensor], dict[str, Any]]
NOT_READ = re.compile(
    r"compressor|vision_clip|inv_freq|position_ids|post_layernorm|vision_model\.head|^image_|logit_scale"
)
"""Parts that loading leaves out for a stated reason: teachers, heads, old buffers, what comes behind the features."""


def exported(family: str, model: VLM) -> Published:
    """What the family writes of a tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        FAMILIES[family].export(model, Path(folder) / "out", None)
        state = read_folder(f"{folder}/out")
        return state, read_json(Path(folder) / "out" / "config.json")


def eve() -> Published:
    tower = {"mm_vision_tower": "openai/eve-patch4-anypixel-672"}
    return test_eve.random_state(test_eve.published_keys()), test_eve.CONFIG | tower


def llava_hf() -> Published:
    state = LlavaForConditionalGeneration(LlavaConfig(**test_llava_hf.CONFIG)).state_dict()
    return {key: value for key, value in state.items() if ".layers.2." not in key or "vision" not in key}, {
        **test_llava_hf.CONFIG
    }


def llava_next() -> Published:
    state = LlavaNextForConditionalGeneration(LlavaNextConfig(**test_llava_next.CONFIG)).state_dict()
    return {key: value for key, value in state.items() if ".layers.2." not in key or "vision" not in key}, {
        **test_llava_next.CONFIG
    }


MADE: dict[str, Callable[[], Published]] = {
    "eve": eve,
    "eve_v2": lambda: exported("eve_v2", test_eve.model_of(test_eve.V2)),
    "fuyu": lambda: exported("fuyu", build(tiny_slots(**test_fuyu.PARTS))),
    "hovle": lambda: exported("hovle", hovle_model("hovle")),
    "hovle_hd": lambda: exported("hovle_hd", hovle_model("hovle_hd")),
    "llava-hf": llava_hf,
    "llava_next": llava_next,
    "mono_internvl": lambda: exported("mono_internvl", test_mono_internvl.model_of()),
    "ola_vlm": lambda: exported("ola_vlm", test_ola_vlm.model_of("llama")),
    "ola_vlm convnext": lambda: exported("ola_vlm", test_ola_vlm.model_of("phi3", convolutional=True)),
    "vila": lambda: (test_vila.in_memory("mlp_downsample"), test_vila.config_of("mlp_downsample")),
    "vila flat": test_vila.flat,
}


@cache
def published(name: str) -> Published:
    """State dict and configuration of a tiny model."""
    state, config = MADE[name]()
    return {key: value for key, value in state.items() if not NOT_READ.search(key)}, config


def keys_of(name: str) -> list[str]:
    """All keys but those of repeated blocks after their first one."""
    return [key for key in published(name)[0] if not re.search(r"\.(layers|blocks|stages)\.[1-9]", key)]


def refused(name: str, state: Mapping[str, Tensor], key: str) -> str | None:
    """What is wrong with the way a state dict is refused; None for an error that names the key and the family."""
    family = name.split(" ")[0]
    try:
        load_published(family, state, published(name)[1])
    except ValueError as error:
        return None if key in str(error) and family in str(error) else f"{key}: {error}"
    return f"{key}: loaded"


def lost(name: str) -> list[str | None]:
    state = published(name)[0]
    return [refused(name, {k: v for k, v in state.items() if k != key}, key) for key in keys_of(name)]


def unknown(name: str) -> list[str | None]:
    state = published(name)[0]
    surplus = ["surprise.weight", *(f"{key}_more" for key in keys_of(name)[::4])]
    return [refused(name, state | {key: torch.zeros(1)}, key) for key in surplus]


def longer(name: str) -> list[str | None]:
    state = published(name)[0]
    changed = {key: torch.cat([state[key], state[key][:1]]) for key in keys_of(name)}
    return [refused(name, state | {key: value}, key) for key, value in changed.items()]


def wider(name: str) -> list[str | None]:
    state = published(name)[0]
    changed = {key: torch.cat([state[key], state[key][..., :1]], dim=-1) for key in keys_of(name)}
    return [refused(name, state | {key: value}, key) for key, value in changed.items()]


def flat(name: str) -> list[str | None]:
    state = published(name)[0]
    return [refused(name, state | {key: state[key].flatten()[None, None, None]}, key) for key in keys_of(name)]


@pytest.mark.parametrize("change", [lost, unknown, longer, wider, flat])
@pytest.mark.parametrize("name", MADE)
def test_a_key_that_is_lost_unknown_or_of_another_shape_is_refused_by_name(
    name: str, change: Callable[[str], list[str | None]]
) -> None:
    assert {made.split(" ")[0] for made in MADE} == FAMILIES.keys()
    state, config = published(name)
    load_published(name.split(" ")[0], state, config)
    problems = change(name)
    assert len(problems) > 4
    assert [problem for problem in problems if problem] == []
