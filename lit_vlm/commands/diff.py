"""`lit-vlm inspect --diff`: the settings in which two recipes, scales, stages or runs differ, and no others."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from lit_vlm.commands.lightning_cli import LitVLMCLI
from lit_vlm.commands.named_sources import KEYS
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.run import STATE_FILE, RunState
from lit_vlm.data.sources.base import name_of

CLASS = ""
"""The key under which the tree of an object's settings has its class."""
MISSING = "–"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Row:
    """A setting that differs: its key as a flag has it, and what it is on either side."""

    key: str
    first: str
    second: str


@dataclass(frozen=True)
class Side:
    """One of the two: what it is called, and the settings of its stages, in order."""

    label: str
    stages: dict[str, dict[str, Any]]


def print_diff(names: Sequence[str], scale: str | None, stages: Sequence[str] | None, console: Console) -> None:
    """Print the settings that differ, stage by stage; what differs alike in all stages comes first.

    Args:
        names: two of RECIPE, RECIPE:SCALE, RECIPE:SCALE:STAGE, the folder of a run, or of a stage of one.
        scale: of recipes that name none; default: that of the recipe.
        stages: only these; default: those that are run at the scale.
        console: where to.

    Raises:
        ValueError: for a name of something that is not there.
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
    """Which stages to compare: those of one name, and the others in their order."""
    others = iter([stage for stage in second if stage not in first])
    pairs = [(stage, stage if stage in second else next(others, None)) for stage in first]
    return [(one, other) for one, other in pairs if other is not None]


class _Settings(LitVLMCLI):
    """Only parses."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse flags, or a config."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Leave the config as it is."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


def resolved(arguments: list[str] | dict[str, Any]) -> dict[str, Any]:
    """All settings that these flags, or this config, give."""
    cli = _Settings(arguments, run=False)
    settings: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    return settings


def _of_run(file: Path) -> dict[str, Any]:
    """The settings of a stage that was run, without what is of this run alone."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("ckpt_path", "weights_only")}
    settings = resolved(config)
    start, folder = settings["model"]["stage"]["start_from"], settings["trainer"]["default_root_dir"]
    if start and folder and Path(start).parent == Path(folder).parent:
        settings["model"]["stage"]["start_from"] = Path(start).name
    return settings


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Row]:
    """Settings that differ, in reading order."""
    yield from _compare(_settings_tree(first), _settings_tree(second), "")


def _settings_tree(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key in ("model", "data", "trainer", "checkpoint", "seed_everything"):
        tree[key] = _tree(settings[key])
    for key in KEYS:
        tree["data"][key.partition(".")[2]] = _sources(settings["data"][key.partition(".")[2]])
    tree["trainer"].pop("default_root_dir", None)  # a place, and no setting
    return tree


def _tree(value: Any) -> Any:
    """A value as nested mappings: objects by their class and arguments, lists of objects by the names of classes."""
    if isinstance(value, dict) and "class_path" in value:
        return {CLASS: value["class_path"], **{key: _tree(one) for key, one in (value.get("init_args") or {}).items()}}
    if isinstance(value, dict):
        return {key: _tree(one) for key, one in value.items()}
    if isinstance(value, list) and value and all(isinstance(one, dict) and "class_path" in one for one in value):
        return _by_name([(_short(one["class_path"]), _tree(one)) for one in value])
    return value


def _sources(given: Any) -> dict[str, Any]:
    """Sources by name, however they are given."""
    if isinstance(given, str):
        return {name_of(given): given}
    if isinstance(given, dict):
        named = [(name, _tree(one)) for name, one in given.items() if one is not None]
    else:
        named = [(_source_name(one), _tree(one)) for one in given or ()]
    return _by_name(
        [(name, {k: v for k, v in one.items() if k != "name"} if isinstance(one, dict) else one) for name, one in named]
    )


def _source_name(source: Mapping[str, Any]) -> str:
    """What a source of a list goes by: its name, the file that it reads, or its class."""
    arguments = source.get("init_args") or {}
    if arguments.get("name"):
        return str(arguments["name"])
    path = arguments.get("path")
    return name_of(path) if isinstance(path, str) else _short(source["class_path"]).lower()


def _by_name(named: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in named:
        number, label = 1, name
        while label in found:
            number += 1
            label = f"{name}-{number}"
        found[label] = one
    return found


def _compare(first: Any, second: Any, key: str) -> Iterator[Row]:
    if not (isinstance(first, dict) and isinstance(second, dict)):
        if first != second:
            yield from _rows_of(first, second, key)
        return
    if not _same_class(first.get(CLASS), second.get(CLASS)):
        called = [_short(one[CLASS]) if CLASS in one else _told(one) for one in (first, second)]
        yield Row(key, *(called if called[0] != called[1] else (first[CLASS], second[CLASS])))
    for name in [*first, *(name for name in second if name not in first)]:
        inner = f"{key}.{name}" if key else name
        if name == CLASS:
            continue
        if name in first and name in second:
            yield from _compare(first[name], second[name], inner)
        elif name in first and not _is_default(first, name):
            yield from _rows_of(first[name], _Missing, inner)
        elif name in second and not _is_default(second, name):
            yield from _rows_of(_Missing, second[name], inner)


class _Missing:
    """In place of a value where there is none."""


def _rows_of(first: Any, second: Any, key: str) -> Iterator[Row]:
    """Rows of a value of which at most one side is a mapping; arguments at their defaults say nothing."""
    value = first if isinstance(first, dict) else second
    if not isinstance(value, dict) or not value:
        yield Row(key, _told(first), _told(second))
        return
    if CLASS in value:
        yield Row(key, *(_short(one[CLASS]) if one is value else _told(one) for one in (first, second)))
    for name, one in value.items():
        if name != CLASS and not _is_default(value, name):
            sides = (one, _Missing) if value is first else (_Missing, one)
            yield from _rows_of(sides[0], sides[1], f"{key}.{name}")


def _is_default(tree: Mapping[str, Any], name: str) -> bool:
    """Whether an object's argument has its default."""
    found = _class(tree.get(CLASS))
    parameter = inspect.signature(found).parameters.get(name) if found is not None else None
    default = None if parameter is None else parameter.default
    return parameter is not None and (list(default) if isinstance(default, tuple) else default) == tree[name]


def _same_class(first: str | None, second: str | None) -> bool:
    return first == second or (_class(first) is not None and _class(first) is _class(second))


def _class(path: str | None) -> Any:
    """The class of a path; None for one that is not there."""
    module, _, name = (path or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _told(value: Any) -> str:
    if value is _Missing:
        return MISSING
    if isinstance(value, str):
        return value.replace("\n", "\\n") or '""'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_told(one)}' for name, one in value.items())}}}"
    return str(value)


def _columns(rows: Sequence[Row], first: Side, second: Side) -> list[list[str]]:
    return [["", *(row.key for row in rows)], [first.label, *(row.first for row in rows)]]


def _line(console: Console, row: Row, widths: Sequence[int]) -> None:
    text = f"  {row.key:<{widths[0]}}  {row.first:<{widths[1]}}  {row.second}"
    console.print(text, soft_wrap=True, markup=False, highlight=False)
