"""The best setting of a search: as flags, and as a recipe on top of the one that was searched."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from lit_vlm.core.written import write_whole
from lit_vlm.experiments.file import flag_words

RECIPE = "best"
"""Folder of the recipe, in that of the search."""
GROUPS = {(), ("model",), ("model", "stage"), ("data",), ("trainer",), ("checkpoint",), ("preemption",), ("watchdog",)}
"""Mappings of a config that a later file adds to; it replaces all others, but for the arguments of a class."""


def flags_line(setting: Mapping[str, Any]) -> str:
    """A setting as flags of `lit-vlm run`."""
    return shlex.join(flag_words(setting))


def write_recipe(
    folder: Path, base: str, scale: str | None, stages: Sequence[str], trial: Path, setting: Mapping[str, Any]
) -> Path:
    """Write a recipe that is another one with the setting of a trial.

    What stands in a mapping that a config file replaces as a whole, such as the learning rates of a stage, is written
    with its neighbours, from the settings of the trial.

    Args:
        folder: folder of the search.
        base: name of the recipe, or its path from the new recipe's folder.
        scale: the scale that was searched; its settings come behind those of stages, so the setting is written there.
        stages: stages of the trials.
        trial: folder of the trial.
        setting: flag → value.

    Returns:
        folder of the recipe.

    Raises:
        OSError: where it cannot be written, or the trial's folder lacks its settings.
    """
    recipe = folder / RECIPE
    about = f"{base} with the best setting of {folder.name}"
    content: dict[str, Any] = {"about": about, "base": base} | ({"scale": scale} if scale else {})
    write_whole(recipe / "recipe.yaml", yaml.safe_dump(content, sort_keys=False))
    for stage in stages:
        config: dict[str, Any] = yaml.safe_load((trial / stage / "config.yaml").read_text(encoding="utf-8"))
        file = recipe / "scales" / scale / f"{stage}.yaml" if scale else recipe / f"{stage}.yaml"
        write_whole(file, yaml.safe_dump(_overlay(config, _of_stage(stage, stages, setting)), sort_keys=False))
    return recipe


def _of_stage(stage: str, stages: Sequence[str], setting: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of one stage: those for all, and those that begin with its name, without that."""
    own = {}
    for flag, value in setting.items():
        first, _, rest = flag.partition(".")
        if first not in stages:
            own[flag] = value
        elif first == stage:
            own[rest] = value
    return own


def _overlay(config: Mapping[str, Any], setting: Mapping[str, Any]) -> dict[str, Any]:
    """A config file that changes a setting, with the values of a resolved config, and nothing else of it.

    A class that is searched is written whole, as an argument that is searched, or set for all trials, is one of it.
    """
    overlay: dict[str, Any] = {}
    for flag, value in setting.items():
        there, into = config, overlay
        *above, last = _keys(config, flag)
        for depth, part in enumerate(above, 1):
            inner = there.get(part)
            if _is_class(inner):
                there = inner.get("init_args") or {}
                into = into.setdefault(part, {"class_path": inner["class_path"]}).setdefault("init_args", {})
            elif tuple(above[:depth]) in GROUPS:
                there, into = inner or {}, into.setdefault(part, {})
            else:
                into[part] = inner
                break
        else:
            into[last] = there.get(last, value)
    return overlay


def _keys(config: Mapping[str, Any], flag: str) -> list[str]:
    """The keys that a flag names, from the outer to the inner one, without those of a class itself."""
    keys: list[str] = []
    there: Any = config
    for part in flag.split("."):
        if _is_class(there):
            if part in ("class_path", "init_args"):
                continue
            there = there.get("init_args")
        keys.append(part)
        there = there.get(part) if isinstance(there, Mapping) else None
    return keys


def _is_class(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping) and "class_path" in value
