"""recipe.yaml: where stages start, what a scale leaves out, and what comes from a base."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_vlm.commands.asked import flags_for
from lit_vlm.commands.recipe import SHIPPED, Recipe, find_recipe, shipped_file, shipped_recipes


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


def recipe_in(folder: Path, recipe: str, **files: str) -> Path:
    """A recipe of these files; `__` stands for a slash in their names."""
    folder.mkdir(parents=True)
    for name, text in {"recipe": recipe, **files}.items():
        file = folder / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def names(recipe: Recipe, stage: str, scale: str | None) -> list[str]:
    *files, _ = recipe.configs(stage, scale, "single")
    return [file.relative_to(recipe.folder.parent).with_suffix("").as_posix() for file in files]


@pytest.fixture
def below(tmp_path: Path) -> Path:
    """A folder of two recipes, the second on top of the first, with a scale that both share."""
    recipe_in(tmp_path / "one", "{stages: [a, b], starts: {b: a}, skip: {big: [a]}, scale: big, strategy: fsdp}",
              model="", stages="", a="", b="", scales__big="", scales__small="", scales__small__a="")  # fmt: skip
    recipe_in(tmp_path / "two", "{base: one, strategies: {small: single}}", model="", b="", scales__small="")
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "small.yaml").touch()
    return tmp_path


def test_files_of_the_base_come_first(below: Path) -> None:
    recipe = find_recipe(str(below / "two"))
    assert recipe.stages == ("a", "b")
    assert recipe.scales == ["big", "small"]
    assert (recipe.scale, recipe.strategy_for(None), recipe.strategy_for("small")) == ("big", "fsdp", "single")
    assert recipe.stages_for("big") == ["b"]
    assert recipe.start_of("b", ["a", "b"]) == "a"
    assert names(recipe, "a", None) == ["one/model", "one/stages", "one/a", "two/model"]
    assert names(recipe, "b", "big") == ["one/model", "one/stages", "one/b", "two/model", "two/b", "one/scales/big"]
    scale = ["scales/small", "one/scales/small", "one/scales/small/a", "two/scales/small"]
    assert names(recipe, "a", "small")[4:] == scale


def test_files_of_the_base_can_be_left_out_and_its_stages_have_other_names(below: Path) -> None:
    folder = recipe_in(
        below / "three", "{base: two, stages: {b: a, c: b}, without: [model, scales/small, a]}", model=""
    )
    recipe = find_recipe(str(folder))
    assert recipe.scales == ["big"]
    assert recipe.starts == {}
    assert names(recipe, "c", None) == ["one/stages", "one/b", "two/b", "three/model"]
    with pytest.raises(ValueError, match=r"recipe 'three' lacks .*three/b.yaml"):
        recipe.configs("b", None, "single")
    with pytest.raises(ValueError, match=r"recipe 'three' has no scale 'bigg' \(did you mean 'big'\?\); scales: big"):
        recipe.configs("c", "bigg", "single")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{base: ones}", r"mine/recipe.yaml: there is no recipe 'ones' for a base.*; recipes: eve, "),
        ("{base: mine}", r"base leads back to where it began: mine → mine"),
        ("{base: circle}", r"circle/recipe.yaml: base leads back to where it began: mine → circle → mine"),
        ("{bases: one}", r"unknown keys \['bases'\]; known: about, base, "),
        ("{scale: big}", r"mine/recipe.yaml needs a list 'stages', or a 'base'"),
        ("[a]", r"mine/recipe.yaml needs a list 'stages', or a 'base'"),
        ("{stages: {a: a}}", r"'a' is no stage of the base; its stages: none, as there is no base"),
        ("{base: one, stages: {a: x}}", r"'x' is no stage of the base; its stages: a, b"),
        ("{base: one, without: [scales/tiny]}", r"without names 'scales/tiny', and the base has no scales/tiny.yaml"),
        ("{base: one, starts: {a: b}}", r"starts says 'a: b'; both must be stages"),
    ],
)
def test_a_base_that_cannot_be_names_the_file(below: Path, text: str, message: str) -> None:
    recipe_in(below / "circle", "{base: mine}")
    with pytest.raises(ValueError, match=message):
        find_recipe(str(recipe_in(below / "mine", text)))


def test_a_base_may_be_shipped_or_a_path(tmp_path: Path) -> None:
    shipped = find_recipe(str(recipe_in(tmp_path / "mine", "{base: llava15}", model="")))
    assert shipped.base is not None
    assert shipped.configs("1_align", "tiny", "single")[0] == SHIPPED / "llava15" / "model.yaml"
    assert SHIPPED / "scales" / "tiny.yaml" in shipped.configs("1_align", "tiny", "single")
    other = recipe_in(tmp_path / "deep" / "er" / "other", "{base: ../../../mine}")
    assert find_recipe(str(other)).base == shipped


def test_shipped_recipes_have_the_scale_that_they_name() -> None:
    for name in shipped_recipes():
        recipe = find_recipe(name)
        assert recipe.scale is None or recipe.scale in recipe.scales
        for stage in recipe.stages:
            assert len(set(recipe.configs(stage, recipe.scale, recipe.strategy))) >= 3


def test_a_shipped_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "recipes/eve/ablations/one_thing.yaml"
    assert shipped_file(name) == SHIPPED / "eve" / "ablations" / "one_thing.yaml"
    assert shipped_file("recipes/eve/ablations/none.yaml") == Path("recipes/eve/ablations/none.yaml")
    assert shipped_file("other/one_thing.yaml") == Path("other/one_thing.yaml")
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("recipe: eve\n")
    assert shipped_file(name) == Path(name)  # one's own comes first
