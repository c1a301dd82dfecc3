"""`lit-vlm inspect --diff`: the settings in which two recipes, scales, stages or runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lit_vlm.commands.differences import Row, differences
from lit_vlm.commands.lightning_cli import ParsedCLI
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.runs import STATE_FILE, RunState

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Side:
    """One of the two sides: its label, and the settings of its stages, in order."""

    label: str
    stages: dict[str, dict[str, Any]]


def print_diff(names: Sequence[str], scale: str | None, stages: Sequence[str] | None, console: Console) -> None:
    """Print the settings that differ, stage by stage; differences that all stages share come first.

    Args:
        names: two names: RECIPE, RECIPE:SCALE, RECIPE:SCALE:STAGE, the folder of a run, or that of a stage of a run.
        scale: scale of a recipe whose name has none; default: the recipe's own.
        stages: stages to compare; default: those that are run at the scale.
        console: where the differences are printed.

    Raises:
        ValueError: when there is no such recipe, scale, stage or run.
    """
    first, second = (read_side(name, scale, stages) for name in names)
    pairs = pair_stages(list(first.stages), list(second.stages))
    found = {pair: list(differences(first.stages[pair[0]], second.stages[pair[1]])) for pair in pairs}
    common = [row for row in found[pairs[0]] if all(row in rows for rows in found.values())] if len(pairs) > 1 else []
    blocks = [("every stage", common)]
    for (one, other), rows in found.items():
        blocks.append((one if one == other else f"{one} | {other}", [row for row in rows if row not in common]))
    lines = [row for _, rows in blocks for row in rows]
    widths = [max((len(text) for text in column), default=0) for column in _columns(lines, first, second)]
    _line(console, Row("", first.label, second.label), widths)
    for title, rows in blocks:
        if rows:
            console.print(title, style="bold")
        for row in rows:
            _line(console, row, widths)
    for side, own in ((first, 0), (second, 1)):
        for left in [stage for stage in side.stages if all(pair[own] != stage for pair in pairs)]:
            console.print(f"{left}: only {side.label} has this stage", soft_wrap=True)
    if not lines:
        console.print("no setting differs")


def read_side(name: str, scale: str | None, stages: Sequence[str] | None) -> Side:
    """The settings of a recipe or run.

    Raises:
        ValueError: when there is no such recipe, scale, stage or run.
    """
    folder = Path(name)
    if (folder / STATE_FILE).is_file():
        found = {stage: folder / stage / CONFIG for stage in RunState.load(folder).stages}
        configs = {stage: file for stage, file in found.items() if file.is_file() and stage in (stages or found)}
        if not configs:
            raise ValueError(f"{folder} has no {CONFIG} of the stages {', '.join(stages or found)} yet")
        return Side(folder.name, {stage: _of_run(file) for stage, file in configs.items()})
    if (folder / CONFIG).is_file():
        return Side(folder.name, {folder.name: _of_run(folder / CONFIG)})
    recipe_name, named_scale, named_stage = [*name.split(":"), "", ""][:3] if not folder.is_dir() else (name, "", "")
    recipe = find_recipe(recipe_name)
    scale = named_scale or scale or recipe.scale
    chosen = [named_stage] if named_stage else list(stages or recipe.stages_for(scale))
    settings = {}
    for stage in chosen:
        files = recipe.configs(stage, scale, recipe.strategy_for(scale))
        settings[stage] = resolved([word for file in files for word in ("--config", str(file))])
        settings[stage]["model"]["stage"]["start_from"] = recipe.start_of(stage, recipe.stages_for(scale) or chosen)
    return Side(":".join(filter(None, (recipe.name, scale))), settings)


def pair_stages(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of stages to compare: stages of equal names, and the others in their order."""
    others = iter([stage for stage in second if stage not in first])
    pairs = [(stage, stage if stage in second else next(others, None)) for stage in first]
    return [(one, other) for one, other in pairs if other is not None]


def resolved(arguments: list[str] | dict[str, Any]) -> dict[str, Any]:
    """All settings of a stage, defaults included, from its flags or its config.

    Raises:
        ValueError: for a wrong flag or key.
    """
    cli = ParsedCLI(arguments)
    settings: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    return settings


def _of_run(file: Path) -> dict[str, Any]:
    """The settings of a stage that was run, without paths of this run."""
    settings = resolved(yaml.safe_load(file.read_text(encoding="utf-8")))
    start, folder = settings["model"]["stage"]["start_from"], settings["trainer"]["default_root_dir"]
    if start and folder and Path(start).parent == Path(folder).parent:
        settings["model"]["stage"]["start_from"] = Path(start).name
    return settings


def _columns(rows: Sequence[Row], first: Side, second: Side) -> list[list[str]]:
    return [["", *(row.key for row in rows)], [first.label, *(row.first for row in rows)]]


def _line(console: Console, row: Row, widths: Sequence[int]) -> None:
    text = f"  {row.key:<{widths[0]}}  {row.first:<{widths[1]}}  {row.second}"
    console.print(text, soft_wrap=True, markup=False, highlight=False)
