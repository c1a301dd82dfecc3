"""EVE and EVEv2: every stage runs, and sharded training with text in between gives the weights of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lit_vlm.recipe import find_recipe
from tests.runs import lit_vlm, tiny_fit

RECIPES = ("eve", "eve_v2")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_all_stages_run_one_after_the_other(name: str, tmp_path: Path) -> None:
    flags = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1"]
    lit_vlm(tmp_path, "run", name, "--scale", "tiny", "--out", "out", *flags)
    recipe = find_recipe(name)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["done"] == list(recipe.stages)
    starts = {
        stage: yaml.safe_load((tmp_path / "out" / stage / "config.yaml").read_text())["model"]["stage"]["start_from"]
        for stage in recipe.stages
    }
    assert starts[recipe.stages[0]] is None
    if name == "eve":
        assert starts["3_sft"] == starts["3_sft_hd"] == "out/2_pretrain"
    else:
        assert starts["2_1b_vision_hd"] == "out/2_1a_vision"


@pytest.mark.parametrize(("name", "stage"), [("eve", "2_pretrain"), ("eve_v2", "2_1a_vision")])
def test_two_sharded_processes_with_text_in_between_give_the_weights_of_one(
    name: str, stage: str, tmp_path: Path
) -> None:
    # Batches of one: some steps have a picture on one rank only, some on none.
    flags = ["--trainer.logger", "false", "--trainer.limit_val_batches", "0", "--model.stage.train.encoder", "1e-3"]
    flags += ["--model.stage.train.decoder", "1e-3"]
    whole = tiny_fit(tmp_path, "whole", stage, *flags, "--data.batch_size", "2", recipe=name)
    flags += ["--data.batch_size", "1", "--trainer.devices", "2"]
    sharded = tiny_fit(tmp_path, "sharded", stage, *flags, strategy="fsdp", recipe=name)
    assert sharded.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(sharded[key], value, atol=2e-5, rtol=1e-3, msg=key)
