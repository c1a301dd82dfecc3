"""`lit-vlm compare`: scores of finished runs; runs that differ only in the seed share a column."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lit_vlm.checkpoints.folder import checkpoints_in, step_of
from lit_vlm.commands.runs import RunState

SEED_FLAG, DEFAULT_SEED = "--seed_everything", "0"
LOSS, ALL = "loss", "all"


@dataclass(frozen=True)
class Finished:
    """Settings and scores of a finished run.

    Attributes:
        settings: its command line without folder and seed; runs with equal settings share a column.
        seed: value of `--seed_everything`.
        steps: optimizer steps of all stages.
        scores: held-out scores of its last stage, by row: `loss`, `all`, and each source.
        chance: accuracy of guessing, by row, where there are options to choose from.
    """

    settings: tuple[str, ...]
    seed: str
    steps: int
    scores: dict[str, float]
    chance: dict[str, float]


def main(argv: Sequence[str]) -> None:
    """Read the runs and print a table.

    Raises:
        ValueError: as `read_run`.
    """
    parser = argparse.ArgumentParser(
        prog="lit-vlm compare",
        description="Held-out scores at the end of runs, side by side: the share of right choices, or of exact answers "
        "where there are none to choose from. Runs that differ in --seed_everything alone are one column: mean ± "
        "standard deviation over them. Below the table stand the flags that not all have in common.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of `lit-vlm run`, of any recipes")
    groups: dict[tuple[str, ...], list[Finished]] = {}
    for folder in dict.fromkeys(parser.parse_args(argv).runs):
        run = read_run(folder)
        groups.setdefault(run.settings, []).append(run)
    _print(groups, Console(highlight=False, markup=False))


def read_run(folder: Path) -> Finished:
    """Read the settings and scores of a run.

    Raises:
        ValueError: when the folder is not that of a run, or the run has not ended or has no scores.
    """
    state = RunState.load(folder)
    if missing := [stage for stage in state.stages if stage not in state.done]:
        raise ValueError(f"{folder} has not ended: {', '.join(missing)} to go; lit-vlm run --resume --out {folder}")
    file = folder / state.stages[-1] / "held_out.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if "after" not in found:
        raise ValueError(f"{file} holds no scores: the last stage of the run needs callbacks.HeldOut")
    seed, flags = _without_seed(state.flags)
    settings = [
        state.recipe,
        *([f"--scale {state.scale}"] if state.scale else []),
        f"--stages {','.join(state.stages)}",
        *flags,
    ]
    scores, chance = _scores(found["after"])
    steps = sum(step_of(checkpoints_in(folder / stage)[-1]) for stage in state.stages)
    return Finished(tuple(settings), seed, steps, scores, chance)


def _without_seed(flags: Sequence[str]) -> tuple[str, list[str]]:
    """The seed, and the other flags with their values, sorted, as their order does not matter."""
    rest: list[str] = []
    seed, index = DEFAULT_SEED, 0
    while index < len(flags):
        name, _, value = flags[index].partition("=")
        index += 1
        if not value and index < len(flags) and not flags[index].startswith("--"):
            value = flags[index]
            index += 1
        if name == SEED_FLAG:
            seed = value
        else:
            rest.append(f"{name} {shlex.quote(value)}" if value else name)
    return seed, sorted(rest)


def _scores(after: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    scores, chance = {LOSS: after["loss"]}, {}
    for name, own in {ALL: after, **after["by_source"]}.items():
        scores[name] = own["choice_accuracy" if own["num_choices"] else "exact_match"]
        if own["num_choices"]:
            chance[name] = own["choice_chance"]
    return scores, chance


def _print(groups: dict[tuple[str, ...], list[Finished]], console: Console) -> None:
    """Print a table with a lettered column for each group of runs, and below it the settings of each letter."""
    rows = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run.scores))
    chance = {name: share for runs in groups.values() for run in runs for name, share in run.chance.items()}
    common = set.intersection(*(set(settings) for settings in groups))
    letters = dict(zip(groups, _letters(), strict=False))
    table = Table(title="held out, at the end of each run", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for letter in letters.values():
        table.add_column(letter, justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True, style="dim")
    table.add_row("seeds", *(" ".join(sorted(run.seed for run in runs)) for runs in groups.values()))
    table.add_row("steps", *("/".join(map(str, sorted({run.steps for run in runs}))) for runs in groups.values()))
    table.add_section()
    for name in rows:
        cells = [
            _spread([run.scores[name] for run in runs if name in run.scores], name == LOSS) for runs in groups.values()
        ]
        table.add_row(name, *cells, f"{chance[name]:.1%}" if name in chance else "")
    wanted = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.width = max(console.width, wanted)  # a number that is cut off would be misread
    console.print(table)
    if common:
        console.print("all: " + " ".join(flag for flag in next(iter(groups)) if flag in common), soft_wrap=True)
    for settings, letter in letters.items():
        own = " ".join(flag for flag in settings if flag not in common) or "(no other flag)"
        console.print(f"{letter}: {own}", soft_wrap=True)


def _letters() -> Iterator[str]:
    """A, B, ..., Z, AA, AB, ..."""
    for length in count(1):
        yield from map("".join, product(ascii_uppercase, repeat=length))


def _spread(values: Sequence[float], plain: bool) -> str:
    if not values:
        return ""
    scale, digits = (1, 3) if plain else (100, 1)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"
