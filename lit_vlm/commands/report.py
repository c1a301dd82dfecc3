"""The report of a finished run: held-out scores of its stages, its pictures, and commands to try next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_vlm.checkpoints.folder import checkpoints_in

COLUMNS = (
    ("loss", "loss", "{:.3f}"),
    ("exact match", "exact_match", "{:.1%}"),
    ("word F1", "token_f1", "{:.1%}"),
    ("multiple choice", "choice_accuracy", "{:.1%}"),
)


def report(folder: Path, stages: Sequence[str], next_steps: Sequence[str], console: Console) -> None:
    """Print the report of a finished run.

    Args:
        folder: folder of the whole run.
        stages: its stages, in order.
        next_steps: commands to try; `{run}` stands for the folder.
        console: where the report is printed.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    pictures: list[Path] = []
    for stage in stages:
        file = folder / stage / "held_out.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        first = "before training" if stage == stages[0] else f"before {stage}"
        rows += [(first, found["before"])] if "before" in found else []
        rows += [(f"after {stage}", found["after"])] if "after" in found else []
        pictures += [picture for picture in [folder / stage / "answers.png"] if picture.exists()]
        if stage == stages[-1] and "shuffled" in found:
            rows.append((f"after {stage}, pictures shuffled", found["shuffled"]))
    console.rule("done")
    if rows:
        console.print(_table(rows))
        if len(rows[-1][1].get("by_source") or ()) > 1:
            console.print(_table_by_source(rows))
    for picture in pictures[-1:]:
        console.print(f"held-out pictures and answers: {picture}", soft_wrap=True)
    found_checkpoints = checkpoints_in(folder / stages[-1])
    if found_checkpoints:
        console.print(f"checkpoint: {found_checkpoints[-1]}", soft_wrap=True, highlight=False)
    if next_steps:
        console.print("\ntry next:")
        for step in next_steps:
            console.print(f"  {step.replace('{run}', str(folder / stages[-1]))}", soft_wrap=True, highlight=False)


def _table(rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    last = rows[-1][1]
    title = f"{last['num_records']} held-out questions, {last['num_choices']} with answers to choose from"
    precisions = dict.fromkeys(scores["precision"] for _, scores in rows if "precision" in scores)
    table = Table(title=title, caption=f"scored in {', '.join(precisions)}" if precisions else None)
    table.add_column("")
    columns = COLUMNS if last["num_choices"] else COLUMNS[:-1]
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for label, scores in rows:
        table.add_row(label, *(form.format(scores[key]) for _, key, form in columns))
    if last["num_choices"]:
        table.add_section()
        table.add_row("chance", "", "", "", f"{last['choice_chance']:.1%}", style="dim")
    return table


def _table_by_source(rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    last = rows[-1][1]["by_source"]
    table = Table(title="multiple choice by source; exact match where there are no answers to choose from")
    table.add_column("")
    for source in last:
        table.add_column(source, justify="right")
    for label, scores in rows:
        found = [scores["by_source"][source] for source in last]
        table.add_row(label, *(f"{s['choice_accuracy' if s['num_choices'] else 'exact_match']:.1%}" for s in found))
    table.add_section()
    chance = [f"{s['choice_chance']:.1%}" if s["num_choices"] else "" for s in last.values()]
    table.add_row("chance", *chance, style="dim")
    table.add_row("questions", *(f"{s['num_records']}" for s in last.values()), style="dim")
    return table
