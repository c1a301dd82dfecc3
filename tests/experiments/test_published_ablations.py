"""Shipped ablations: every variant's flags hold at the scale of its file, and variants are ready at a small one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from lit_vlm.checkpoints.weights import by_slot
from lit_vlm.commands.dry_run import check_recipe
from lit_vlm.commands.fit import quietly
from lit_vlm.commands.recipe import SHIPPED, find_recipe
from lit_vlm.commands.run import stage_words
from lit_vlm.commands.runs import RunState
from lit_vlm.core.part import StateDict
from lit_vlm.core.settings import checked
from lit_vlm.evaluation.tasks import TASKS
from lit_vlm.experiments.file import AblationFile, Variant, read_file
from lit_vlm.model.build import build_on_meta, check_saved
from lit_vlm.planning.published import shipped
from tests.tiny import ROOT

FILES = sorted(file for file in SHIPPED.glob("*/ablations/*.yaml") if file.parent.parent.name != "quickstart")
"""Those of the quick start need its packages, which are pretrained parts; tests have none."""
PAGE = ROOT / "docs" / "ablations.md"
NOT_SMALL = {"vila_paper/table_3": ["mmc4-pairs"]}
"""File → variants that no small scale has: drawn documents are not taken apart into pairs as those of MMC4 are."""
SOME = {"hovle/stages": ["no-alignment"], "vila_paper/table_8": ["visual-expert"]}
"""Files of `make test-slow`, and the variants that it runs dry; `make test-published` takes all of all files."""

PROBED = {"depth": "depth_order", "seg": "miou"}
"""Target of a probe → the score that says how good it is."""


class Own(NamedTuple):
    """A stage that no variant before has.

    Attributes:
        name: of its own.
        words: arguments of `lit-vlm`.
        before: name of the stage that it starts from.
        first: whether it is the first one in which its variant differs from those before.
    """

    name: str
    words: list[str]
    before: str | None
    first: bool


def name_of(file: Path) -> str:
    return f"{file.parent.parent.name}/{file.stem}"


def variants_of(file: Path) -> list[Variant]:
    """The variants of a file, on one device."""
    return [replace(variant, strategy="single") for variant in read_file(file).all_variants()]


def own_stages(variants: Sequence[Variant]) -> Iterator[Own]:
    """The stages that variants do not share."""
    known: dict[tuple[str, ...], str] = {}
    for variant in variants:
        recipe = find_recipe(variant.recipe)
        stages = list(variant.stages or recipe.stages_for(variant.scale))
        state = RunState(variant.recipe, variant.scale, str(variant.strategy), stages, list(variant.flags))
        named: dict[str, str] = {}
        first = True
        for stage in stages:
            start = recipe.start_of(stage, stages)
            before = named[start] if start else None
            place = Path("out", before) if before else None
            key = tuple(stage_words(recipe, state, stage, Path("same"), place))
            if key in known:
                named[stage] = known[key]
                continue
            named[stage] = known[key] = name = f"{variant.name}.{stage}"
            yield Own(name, stage_words(recipe, state, stage, Path("out", name), place), before, first)
            first = False


def small(variant: Variant, file: Path) -> Variant:
    """The variant at the smallest scale that knows its flags; `mini` makes parts and data itself."""
    if read_file(file).scale == "mini":
        return variant
    scales = find_recipe(variant.recipe).scales
    return replace(variant, scale="tiny_deep" if "tiny_deep" in scales else "tiny")


WHOLE = [pytest.param(file, None, marks=pytest.mark.published, id=name_of(file)) for file in FILES]
IN_PART = [
    pytest.param(file, SOME[name_of(file)], id=f"{name_of(file)} in part") for file in FILES if name_of(file) in SOME
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "some"), [*IN_PART, *WHOLE])
def test_variants_are_ready_at_a_small_scale(
    file: Path,
    some: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    left_out = NOT_SMALL.get(name_of(file), ())
    names = some or [one.name for one in variants_of(file) if one.name not in left_out]
    variants = [small(one, file) for one in variants_of(file) if one.name in names]
    assert len(variants) == len(names)
    commands = {stage.name: stage.words for stage in own_stages(variants)}
    ready = check_recipe(commands, Console(width=1000))
    said = capsys.readouterr().out
    assert ready, said
    assert said.count("ran forward and backward") == len(commands)


MINI = sorted(file.parent.parent.name for file in SHIPPED.glob("*/scales/mini.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name == "hovle" else pytest.mark.published) for name in MINI]
)
def test_every_stage_of_the_scale_mini_is_ready(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (base,) = checked(AblationFile, {"recipe": recipe, "scale": "mini", "strategy": "single"}, recipe).all_variants()
    commands = {stage.name: stage.words for stage in own_stages([base])}
    ready = check_recipe(commands, Console(width=1000))
    assert ready, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=() if name_of(file) in SOME else pytest.mark.published, id=name_of(file))
        for file in FILES
    ],
)
def test_flags_of_every_variant_hold_at_the_scale_of_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_vlm.commands.lightning_cli import CheckedCLI

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    left: dict[str, Mapping[str, StateDict]] = {}
    variants = variants_of(file)
    for stage in own_stages(variants):
        # Of each variant the first stage that is its own, and of the base all: later ones have the same flags.
        if not stage.first and not stage.name.startswith(f"{variants[0].name}."):
            continue
        with quietly(), shipped():
            cli: Any = CheckedCLI([*stage.words[1:], "--trainer.logger", "false", "--trainer.accelerator", "cpu"])
            model = build_on_meta(cli.model.slots)
        settings = cli.model.stage
        settings.freeze(model, cli.model.slots.removed_heads)
        assert settings.make_optimizer(model).param_groups, stage.name
        if stage.before:
            with shipped():  # with adapters the model is built once more, without them
                check_saved(model, cli.model.slots, left[stage.before], settings.fresh, stage.before)
        states = by_slot(model.state_dict())
        left[stage.name] = {slot: state for slot, state in states.items() if slot not in settings.leave_out}
    assert len(left) >= len(variants)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_claims_are_about_scores_that_the_file_asks_for(file: Path) -> None:
    content = read_file(file)
    asked = {f"{one.name}/{shots}-shot" for one in content.evaluate for shots in one.shots}
    assert {one.name for one in content.evaluate} <= set(TASKS)
    assert content.source
    assert content.claims
    for claim in content.claims:
        task, _, rest = claim.score.partition("/")
        if task == "held_out":
            source, _, score = rest.rpartition("/")
            held_out = _held_out(content)
            assert source in held_out if source else held_out, claim.text  # of all questions where none is named
            assert score == "accuracy", claim.text
            continue
        if task == "probe":
            assert rest in {f"{one.target}/{PROBED[one.target]}" for one in content.probe}, claim.text
            continue
        prompt, _, score = rest.partition("/")
        assert f"{task}/{prompt}" in asked, claim.text
        assert score in ("2d", "3d") or score.startswith((TASKS[task].main, "circular", "task/", "kind/")), claim.text


def _held_out(content: AblationFile) -> set[str]:
    """Sources of questions that the file itself holds out, or asks more of than its recipe."""
    values = [value for flag, value in content.base.items() if flag.endswith(".data.val")]
    changed = [flag.partition(".data.val.")[2] for flag in content.base]
    return {name for value in values for name in value} | {flag.partition(".")[0] for flag in changed if flag}


def test_the_page_lists_every_file() -> None:
    files = sorted(SHIPPED.glob("*/ablations/*.yaml"))
    page = PAGE.read_text(encoding="utf-8")
    for file in files:
        recipe, name = name_of(file).split("/")
        content = read_file(file)
        assert f"| `recipes/{recipe}/ablations/{name}.yaml` | {content.about}" in page
        assert f"{content.source.split(' (')[0]} | {len(content.all_variants())} |" in page
