"""recipe.yaml: where stages start, and what a scale leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.run import flags_for


def written(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(f"stages: [a, b, c, d]\n{text}\n")
    return str(folder)


def test_a_stage_starts_from_the_one_that_is_named_or_the_one_before(tmp_path: Path) -> None:
    recipe = find_recipe(written(tmp_path, "starts: {d: b}"))
    stages = list(recipe.stages)
    assert [recipe.start_of(stage, stages) for stage in stages] == [None, "a", "b", "b"]
    # Without the stage that is named, the one before it in the run.
    assert recipe.start_of("d", ["a", "c", "d"]) == "c"
    assert recipe.start_of("d", ["d"]) is None


def test_a_scale_leaves_stages_out(tmp_path: Path) -> None:
    recipe = find_recipe(written(tmp_path, "skip: {small: [b, d]}"))
    assert recipe.stages_for("small") == ["a", "c"]
    assert recipe.stages_for(None) == recipe.stages_for("large") == ["a", "b", "c", "d"]


@pytest.mark.parametrize("starts", ["{d: x}", "{x: a}", "{b: c}", "{b: b}"])
def test_a_start_that_is_no_earlier_stage_names_the_file(tmp_path: Path, starts: str) -> None:
    with pytest.raises(ValueError, match=r"recipe.yaml: starts says .*; both must be stages"):
        find_recipe(written(tmp_path, f"starts: {starts}"))


def test_a_flag_can_be_meant_for_one_stage() -> None:
    flags = ["--data.seed", "1", "--2_sft.data.batch_size=4", "--1_align.trainer.max_steps", "7", "--model.x", "-1"]
    stages = ("1_align", "2_sft")
    assert flags_for("1_align", flags, stages) == ["--data.seed", "1", "--trainer.max_steps", "7", "--model.x", "-1"]
    assert flags_for("2_sft", flags, stages) == ["--data.seed", "1", "--data.batch_size=4", "--model.x", "-1"]
