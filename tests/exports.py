"""Recipes as models without training, exported for tests and for the table of docs/export.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    found = find_recipe(recipe)
    stage = stage or found.stages_for("tiny")[-1]
    config = resolved([word for file in found.configs(stage, "tiny", "single") for word in ("--config", str(file))])
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


def exported(folder: Path, recipe: str, stage: str | None = None, **changes: Any) -> tuple[LitVLM, Differences]:
    """Export a tiny model of a recipe; returns it as the kit has it, and how much of it changed on the way."""
    module, config, written = read(recipe, stage, **changes)
    return module, export_hf(module.vlm, config, written, module.input_spec, folder)


TINY = [name for name in shipped_recipes() if "tiny" in find_recipe(name).scales]
"""Recipes that have a tiny scale."""
