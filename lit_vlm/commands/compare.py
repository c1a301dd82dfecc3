"""`lit-vlm compare`: scores of finished runs side by side, and their differences, paired by seed and by question."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import count, product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lit_vlm.core.plugins import nearest
from lit_vlm.core.written import write_whole
from lit_vlm.experiments.report import Gap, Study, gaps, not_compared, words, write_report
from lit_vlm.experiments.report import tables as tabled
from lit_vlm.experiments.results import Run
from lit_vlm.experiments.scores import by_settings, read_run

MOST_KINDS = 12
"""Scores of more kinds of question are left to the report."""

LONGEST_NAME = 60
"""Letters of a variant's name in a report."""


def main(argv: Sequence[str]) -> None:
    """Read the runs, print tables, and write what was asked for.

    Raises:
        ValueError: as `read_run`, or for a score or a base that no run has.
    """
    arguments = _parser().parse_args(argv)
    folders = list(dict.fromkeys(arguments.runs))
    runs = by_settings([read_run(folder) for folder in folders], _letters())
    _check_scores(arguments.score, runs)
    base = _base(arguments.base, runs)
    command = shlex.join(["lit-vlm", "compare", *argv])
    title = f"Comparison of {', '.join(dict.fromkeys(_what(run) for run in runs))}"
    study = Study(title, base, runs, scores=arguments.score, command=command)
    found = gaps(study)
    console = Console(highlight=False, markup=False)
    _print(study, found, console)
    if arguments.json:
        write_whole(arguments.json, json.dumps(_plain(study, found), indent=2, ensure_ascii=False) + "\n")
    if arguments.report:
        files = write_report(_named(study), arguments.report)
        console.print(f"report: {', '.join(map(str, files))}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm compare",
        description="Scores at the end of runs, side by side: held-out questions, what lit-vlm evaluate left beside "
        "the runs, and probes. Runs that differ in --seed_everything alone are one column: mean ± standard deviation "
        "over them. Columns are compared with the first one at the same seeds and questions. Below the tables stand "
        "the flags that not all have in common.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of `lit-vlm run` of any recipes, or of stages")
    parser.add_argument("--base", metavar="A", help="letter or folder of what is compared with (A)")
    parser.add_argument(
        "--score",
        action="append",
        default=[],
        metavar="NAME",
        help="a score to show, such as scenes/0-shot/accuracy or val/loss; may be given several times "
        "(default: the main ones)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures into a file")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a report: page, Markdown, figures")
    return parser


def _what(run: Run) -> str:
    """The recipe of a run, or of a stage by itself its folder's name."""
    first = next(iter(run.flags), "--")
    return run.folder.name if first.startswith("--") else first


def _check_scores(names: Sequence[str], runs: Sequence[Run]) -> None:
    known = dict.fromkeys(name for run in runs for name in run.scores)
    for name in names:
        if name not in known:
            raise ValueError(
                f"--score {name}: no run has it{nearest(name, list(known))}; there are: {', '.join(known)}"
            )


def _base(given: str | None, runs: Sequence[Run]) -> str:
    """The variant that others are compared with, by its letter or one of its folders."""
    if given is None:
        return runs[0].variant
    for run in runs:
        if given == run.variant or Path(given).absolute() == run.folder.absolute():
            return run.variant
    letters = ", ".join(dict.fromkeys(run.variant for run in runs))
    raise ValueError(f"--base {given} is neither a letter of the table ({letters}) nor one of the folders")


def _letters() -> Iterator[str]:
    """A, B, ..., Z, AA, AB, ..."""
    for length in count(1):
        yield from map("".join, product(ascii_uppercase, repeat=length))


def _named(study: Study) -> Study:
    """The same study with variants that are named by what they say of their own, for a page that is read alone."""
    own = {variant: settings for variant, settings in tabled.settings_table(study).rows}
    names = {letter: letter if own[letter] == tabled.NO_FLAG else _short(f"{letter}: {own[letter]}") for letter in own}
    runs = [replace(run, variant=names[run.variant]) for run in study.runs]
    return replace(study, base=names[study.base], runs=runs)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


# ---------------------------------------------------------------------- output


def _print(study: Study, found: Sequence[Gap], console: Console) -> None:
    """Print a lettered column for each group of runs, differences, and below them the settings of each letter."""
    tables = [_scores(study), *([_differences(study, found)] if found else [])]
    for table in tables:
        wanted = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console.width = max(console.width, wanted)  # a number that is cut off would be misread
    for table in tables:
        console.print(table)
    for line in _remarks(study, found):
        console.print(line, soft_wrap=True)
    for variant, settings in tabled.settings_table(study).rows:
        console.print(f"{variant}: {settings}", soft_wrap=True)


def _scores(study: Study) -> Table:
    groups = {variant: study.of(variant) for variant in study.variants}
    table = Table(title="at the end of each run", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for letter in groups:
        table.add_column(letter, justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True, style="dim")
    table.add_row("seeds", *(" ".join(str(run.seed) for run in runs) for runs in groups.values()))
    steps = ("/".join(map(str, sorted({run.cost.steps for run in runs}))) for runs in groups.values())
    table.add_row("steps", *steps)
    table.add_section()
    for name in study.shown:
        share = study.example(name).share
        scores = [[run.scores[name] for run in runs if name in run.scores] for runs in groups.values()]
        chance = next((one.chance for of in scores for one in of if one.chance is not None), None)
        cells = [words.mean_of([one.value for one in of], share) for of in scores]
        table.add_row(name, *cells, "" if chance is None else words.number(chance, share))
        mixed = [[one.shuffled for one in of if one.shuffled is not None] for of in scores]
        if any(mixed):
            table.add_row("  pictures shuffled", *(words.mean_of(of, share) for of in mixed), style="dim")
        kinds = list(dict.fromkeys(kind for of in scores for one in of for kind in one.by_kind))
        for kind in kinds if len(kinds) <= MOST_KINDS else ():
            values = [[one.by_kind[kind] for one in of if kind in one.by_kind] for of in scores]
            guessed = _chance(study, name, kind)
            table.add_row(f"  {kind}", *(words.mean_of(of, share) for of in values), guessed)
    return table


def _chance(study: Study, name: str, kind: str) -> str:
    """Accuracy of guessing questions of one kind, where their score of their own tells it."""
    group, _, leaf = name.rpartition("/")
    own = [run.scores[f"{group}/{kind}/{leaf}"] for run in study.runs if f"{group}/{kind}/{leaf}" in run.scores]
    return next((words.number(one.chance, one.share) for one in own if one.chance is not None), "")


def _differences(study: Study, found: Sequence[Gap]) -> Table:
    level = found[0].judged.difference.level
    table = Table(title=f"against {study.base}; positive is better", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "", "difference", f"{level:.0%} interval", "seeds better", "p", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for gap in found:
        share, judged = study.example(gap.score).share, gap.judged
        table.add_row(
            gap.variant,
            gap.score,
            words.number(judged.difference.mean, share, signed=True),
            words.interval(judged.difference, share),
            words.signs(judged.difference),
            words.p_value(judged),
            words.COMPARED.get(judged.verdict, judged.verdict),
        )
    return table


def _remarks(study: Study, found: Sequence[Gap]) -> Iterator[str]:
    """What must be known to read the differences."""
    if any(gap.judged.verdict == "one seed" for gap in found):
        yield "one seed: an interval is about questions alone; nothing is said about other seeds"
    if any(gap.judged.difference.seeds_left_out for gap in found):
        yield "differences are those of the seeds that both have, so they need not be those of the means above"
    if len(found) > 1 and any(gap.judged.verdict != "one seed" for gap in found):
        yield f"p is corrected for {len(found)} comparisons (Holm)"
    if lacking := dict.fromkeys(text for gap in found if (text := words.left_out(gap.judged.difference))):
        yield f"of some differences: {'; '.join(lacking)}"
    if unpaired := not_compared(study):
        yield f"not compared with {study.base}: {'; '.join(unpaired)}"


def _plain(study: Study, found: Sequence[Gap]) -> dict[str, Any]:
    """All figures as plain values; what is not finite is null."""
    return {
        "command": study.command,
        "base": study.base,
        "runs": [
            {
                "variant": run.variant,
                "seed": run.seed,
                "folder": str(run.folder),
                "settings": list(run.flags),
                "scores": {
                    name: {key: _finite(getattr(one, key)) for key in ("value", "chance", "shuffled")}
                    for name, one in run.scores.items()
                },
                "cost": {key: _finite(value) for key, value in asdict(run.cost).items()},
                "origin": dict(run.origin),
            }
            for run in study.runs
        ],
        "differences": [_of_gap(gap) for gap in found],
    }


def _of_gap(gap: Gap) -> dict[str, Any]:
    names = [field.name for field in fields(gap.judged.difference) if field.name != "spread"]
    values = {name: _finite(getattr(gap.judged.difference, name)) for name in names}
    own = {"p_corrected": gap.judged.p_value, "verdict": gap.judged.verdict, "seeds_needed": gap.judged.seeds_needed,
           "smallest_detectable": _finite(gap.judged.smallest_detectable)}  # fmt: skip
    return {"variant": gap.variant, "score": gap.score} | values | own


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
