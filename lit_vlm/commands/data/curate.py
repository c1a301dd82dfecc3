"""`lit-vlm data curate`: records that pass the steps of a file → LitData shards, with a report of what was dropped."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_vlm.commands.workers import add_workers, engine_of
from lit_vlm.core.launcher import launch
from lit_vlm.data.curation import STEPS, curate, read_curation
from lit_vlm.data.curation.deciding import READ

WIDTH = 78
"""Columns of the paragraphs of the help, which is not wrapped for the sake of the example."""
DESCRIPTION = (
    "Measure every record of the sources in FILE once, let its steps decide one after the other, and write the records "
    "that stay as a converted set. OUT/curation.json counts what each step dropped, OUT/dropped.parquet lists it, and "
    "OUT/sheets shows some of it. A curation that was stopped goes on with the same command, and all that run it at "
    "the same time, as under srun, share the work."
)
EXAMPLE = """an example of FILE:

  sources:
    laion: {path: data/laion, form: WebDataset}
    sa1b: {class_path: Pictures, init_args: {path: data/sa1b}}
  steps:
    - {class_path: Size, init_args: {min_side: 448}}
    - {class_path: Text, init_args: {min_words: 3, languages: [en]}}
    - {class_path: Sample, init_args: {quotas: {laion: 1000000}}}
  seed: 0
"""


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    steps = f"steps: {', '.join(STEPS)}, and any lit_vlm.data.curation.Step by its class path"
    parser = verbs.add_parser(
        "curate",
        help="choose records by the steps of a file → LitData shards, and what was dropped",
        description=textwrap.fill(DESCRIPTION, WIDTH),
        epilog=f"{textwrap.fill(steps, WIDTH)}\n\n{EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="YAML with sources, steps and seed")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new set")
    parser.add_argument(
        "--measures",
        type=Path,
        help="folder of what is measured, which curations of the same sources share (default: OUT.measures)",
    )
    add_workers(parser)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Curate, and say what each step dropped."""
    out = arguments.out
    curation, started = read_curation(arguments.file, STEPS), launch()
    measures = arguments.measures or out.resolve().with_name(f"{out.resolve().name}.measures")
    with engine_of(arguments.on, arguments.workers) as engine:
        report = curate(curation, out, measures, engine)
    if not started.is_first:
        return
    console = Console(highlight=False)
    console.print(report_table(report, str(out)))
    console.print(
        f"what was dropped is listed in {out / 'dropped.parquet'} and shown in {out / 'sheets'}", soft_wrap=True
    )


def report_table(report: dict[str, Any], title: str) -> Table:
    """A table of what each step did.

    Args:
        report: what `curation.json` says.
        title: of the table.
    """
    table = Table(title=f"{title}: {report['kept']:,} of {report['records']:,} records are kept")
    table.add_column("step")
    table.add_column("in", justify="right")
    table.add_column("dropped")
    table.add_column("kept", justify="right")
    table.add_column("share", justify="right")
    for row in ({"step": READ, **report[READ]}, *report["steps"]):
        dropped = "\n".join(f"{reason} {count:,}" for reason, count in row["dropped"].items())
        share = f"{100 * row['kept'] / row['in']:.1f} %"
        table.add_row(row["step"], f"{row['in']:,}", dropped or "–", f"{row['kept']:,}", share)
    if len(report["sources"]) > 1:
        table.add_section()
        for name, source in report["sources"].items():
            share = f"{100 * source['kept'] / source['records']:.1f} %" if source["records"] else "–"
            table.add_row(name, f"{source['records']:,}", "", f"{source['kept']:,}", share)
    return table
