"""Recipes as models without training, exported for tests and for the table of docs/export.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lit_vlm.commands.diff import resolved
from lit_vlm.commands.recipe import find_recipe, shipped_recipes
from lit_vlm.data import ImageTransform, Template
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.hf.export import Differences, export_hf
from lit_vlm.model.build import build
from lit_vlm.training.module import LitVLM


def read(recipe: str, stage: str | None = None, **changes: Any) -> tuple[LitVLM, dict[str, Any], SampleFormat]:
    """A tiny model of a recipe with random weights, the config of its stage, and the format of its data.

    Args:
        recipe: name of the recipe.
        stage: default: the last one.
        changes: slot → `class_path` and `init_args` in place of the recipe's.
    """
    stage = stage or find_recipe(recipe).stages_for("tiny")[-1]
    config = _config(recipe, stage)
    config["model"] |= changes
    parser = ArgumentParser(parser_mode="omegaconf")
    parser.add_class_arguments(LitVLM, "model")
    parser.add_argument("--template", type=Template)
    parser.add_argument("--transform", type=ImageTransform)
    data = config["data"]
    wanted = {"model": config["model"], "template": data["template"], "transform": data["transform"]}
    objects = parser.instantiate_classes(parser.parse_object(wanted))
    module = objects.model
    module.model = build(module.slots)
    return module.eval(), config, SampleFormat(objects.template, objects.transform, data["max_length"], True)


def _config(recipe: str, stage: str) -> dict[str, Any]:
    files = find_recipe(recipe).configs(stage, "tiny", "single")
    return resolved([word for file in files for word in ("--config", str(file))])


def read_stage(recipe: str, stage: str) -> dict[str, Any]:
    """The keys of `model.stage` that the files of a stage have, defaults left out."""
    keys: dict[str, Any] = {}
    for file in find_recipe(recipe).configs(stage, "tiny", "single"):
        content = yaml.safe_load(file.read_text()) or {}
        keys |= (content.get("model") or {}).get("stage") or {}
    return keys


def exported(folder: Path, recipe: str, stage: str | None = None, **changes: Any) -> tuple[LitVLM, Differences]:
    """Export a tiny model of a recipe; returns it as the kit has it, and how much of it changed on the way."""
    module, config, written = read(recipe, stage, **changes)
    return module, export_hf(module.vlm, config, written, module.input_spec, folder)


TINY = [name for name in shipped_recipes() if "tiny" in find_recipe(name).scales]
"""Recipes that have a tiny scale."""
