"""The file of an ablation: its variants as commands, and what is wrong with one, in a line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_vlm.core.settings import checked
from lit_vlm.experiments.file import AblationFile, read_file

FULL = """
recipe: eve
scale: mini
seeds: 2
base: {model.heads.align: null, data.batch_size: 4}
variants:
  no-stage-1: {stages: [2_pretrain, 3_sft], 2_pretrain.trainer.max_epochs: 2}
  other: {recipe: vila, scale: tiny, data.batch_size: 8}
  same:
grid:
  model.projector: [Linear, lit_vlm.projectors.MLP]
  model.stage.train.projector: [1.0e-4, 1e-3]
  3_sft.model.decoder.lora: {off: null, on: {r: 8}}
evaluate: [{task: scenes, shots: [0, 4]}, {file: mine.jsonl, score: vqa, limit: 5, flags: {think: true}}]
probe: [{target: depth, flags: {exact: true, steps: 9}}]
claims:
  - {text: a, better: base, worse: no-stage-1, score: scenes/0-shot/accuracy}
"""


def read(tmp_path: Path, text: str) -> AblationFile:
    file = tmp_path / "one.yaml"
    file.write_text(text)
    return read_file(file)


def test_variants_are_commands(tmp_path: Path) -> None:
    found = read(tmp_path, FULL)
    assert found.seeds == (0, 1)
    base, no_stage, other, same, *grid = found.all_variants()
    assert (base.name, base.recipe, base.scale, base.stages) == ("base", "eve", "mini", None)
    assert base.flags == ("--model.heads.align", "null", "--data.batch_size", "4")
    assert no_stage.stages == ("2_pretrain", "3_sft")
    assert no_stage.flags == (*base.flags, "--2_pretrain.trainer.max_epochs", "2")
    assert (other.recipe, other.scale) == ("vila", "tiny")
    assert other.flags == ("--model.heads.align", "null", "--data.batch_size", "8")
    assert same.flags == base.flags
    assert len(grid) == 8
    assert [one.name for one in grid[:3]] == [
        "model.projector=Linear,train.projector=0.0001,lora=off",
        "model.projector=Linear,train.projector=0.0001,lora=on",
        "model.projector=Linear,train.projector=1e-3,lora=off",
    ]
    own = ("--model.projector", "lit_vlm.projectors.MLP", "--model.stage.train.projector", "1e-3")
    assert grid[-1].flags == (*base.flags, *own, "--3_sft.model.decoder.lora", '{"r": 8}')


def test_evaluations_are_arguments_of_the_command(tmp_path: Path) -> None:
    scenes, mine = read(tmp_path, FULL).evaluate
    assert scenes.words() == ["--task", "scenes", "--shots", "0,4"]
    words = "--file mine.jsonl --score vqa --limit 5 --shots 0 --think"
    assert (mine.name, mine.words()) == ("mine", words.split())


def test_probes_are_arguments_of_the_command(tmp_path: Path) -> None:
    (depth,) = read(tmp_path, FULL).probe
    assert depth.words(Path("s")) == ["s", "--target", "depth", "--out", "s/probe-depth", "--exact", "--steps", "9"]


@pytest.mark.parametrize("claimed", [False, True])
def test_a_grid_alone_has_a_base_if_a_claim_is_about_it(claimed: bool) -> None:
    claims = [{"text": "t", "better": "base", "worse": "projector=MLP", "score": "held_out/loss"}] if claimed else []
    found = checked(
        AblationFile, {"recipe": "eve", "grid": {"model.projector": ["Linear", "MLP"]}, "claims": claims}, "x"
    )
    names = [variant.name for variant in found.all_variants()]
    assert names == [*(["base"] if claimed else []), "projector=Linear", "projector=MLP"]


CLAIM = {"text": "t", "better": "base", "worse": "a", "score": "s"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({}, "x: recipe: Field required"),
        (
            {"recipe": "eve", "variant": {}},
            "there is no key 'variant' .did you mean 'variants'..; keys: about, source,",
        ),
        ({"recipe": "eve", "seeds": 0}, "x: seeds: at least one seed is needed, found 0"),
        ({"recipe": "eve", "seeds": [1, 1]}, "x: seeds: a seed is named twice"),
        ({"recipe": "eve", "seeds": [-1]}, "x: seeds: a seed is a number from 0 on"),
        ({"recipe": "eve", "variants": {"a": {"stages": "1_a"}}}, "stages: Input should be a valid tuple, found '1_a'"),
        ({"recipe": "eve", "sequential": True}, "seeds are added until claims are decided: add claims, and two seeds"),
        (
            {"recipe": "eve", "evaluate": [{"task": "s"}, {"task": "s", "limit": 2}]},
            "s with 0 shots is there twice",
        ),
        ({"recipe": "eve", "probe": [{"target": "gen"}, {"target": "gen"}]}, "probe: gen is there twice"),
        ({"recipe": "eve", "probe": [{"target": "gen", "flags": {"out": "x"}}]}, "probe: out is no flag here"),
        ({"recipe": "eve", "variants": {"base": {}}}, "variants: 'base' is the variant with no flags of its own"),
        ({"recipe": "eve", "variants": {"a/b": {}}}, "variants: 'a/b' is a folder's name, too"),
        ({"recipe": "eve", "variants": {"a": {"--x": 1}}}, "variants.a: write 'x' without dashes"),
        ({"recipe": "eve", "base": {"seed_everything": 1}}, "base: seed_everything is the seed of each run"),
        ({"recipe": "eve", "base": {"1_a.trainer.default_root_dir": "x"}}, "is what an ablation sets itself"),
        ({"recipe": "eve", "grid": {"a.b": []}}, "x: grid: a.b: give a list of values, or names and values"),
        ({"recipe": "eve", "grid": {"a.b": [{"r": 1}]}}, "a.b: give values that are mappings or lists a name each"),
        ({"recipe": "eve", "grid": {"a.b": [1, 1]}}, "a.b: a value is there twice"),
        ({"recipe": "eve", "grid": {"a.b": ["x y"]}}, "a.b: 'x y' is a part of a folder's name"),
        ({"recipe": "eve", "claims": [CLAIM]}, "claims: there is no variant 'a'; variants: base"),
        ({"recipe": "eve", "claims": [CLAIM | {"worse": "base"}]}, "claims: 't' compares base with itself"),
        ({"recipe": "eve", "claims": [{"text": "t"}]}, "x: claims.0.better: Field required"),
        ({"recipe": "eve", "evaluate": [{}]}, "evaluate.0: name either a task or a file of your own questions"),
        ({"recipe": "eve", "evaluate": [{"task": "s", "score": "vqa"}]}, "score is for a file of your own questions"),
        ({"recipe": "eve", "evaluate": [{"tasks": "s"}]}, "evaluate.0.tasks: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        checked(AblationFile, content, "x")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("- a", "one.yaml holds keys of an ablation, such as 'recipe: eve', not a list"),
        ("a: [", "cannot be read: while"),
    ],
)
def test_a_file_that_is_none_is_named(text: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=error):
        read(tmp_path, text)
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: .*No such file"):
        read_file(tmp_path / "none.yaml")
