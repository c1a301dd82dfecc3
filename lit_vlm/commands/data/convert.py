"""`lit-vlm data convert`: any of the known forms → LitData shards, every image verified."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_vlm.commands.fit import REFUSED
from lit_vlm.core.devices import cores
from lit_vlm.core.launcher import launch
from lit_vlm.core.sizes import parse_size
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.forms import FORMS, open_source
from lit_vlm.data.sets.shared import Place
from lit_vlm.data.sources import Texts


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    parser = verbs.add_parser(
        "convert",
        help="any of the known forms → LitData shards, every image verified",
        description="Convert a source to LitData shards that hold records and encoded images. Every image is decoded "
        "once; what cannot be used is listed in OUT/bad_samples.jsonl. A conversion that was stopped goes on with the "
        "same command, and all that run it at the same time, as under srun, share the work.",
        epilog=f"Forms: {', '.join(FORMS)}. The form is recognised by the file's ending and its first lines.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a file or folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new set")
    parser.add_argument(
        "--form", help="how to read SOURCE, if not as recognised: one of those below, or the class path of a source"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the form's class, e.g. image_folder=images",
    )
    parser.add_argument(
        "--workers", type=int, default=len(cores()), help="processes of each task (default: one per core)"
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, help="share of unusable records above which it fails (0.05)"
    )
    parser.add_argument(
        "--min-side", type=int, default=4, help="an image with a shorter side in pixels is unusable (4)"
    )
    parser.add_argument("--shard-size", default="64MiB", metavar="SIZE", help="size of shards, to a record (64MiB)")
    parser.add_argument(
        "--tokenizer", help="count text tokens with this tokenizer: a hub name, a folder or package:NAME"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Convert a source, and say what came of it."""
    source, started = open_source(arguments.source, arguments.form, arguments.set), launch()
    try:
        info = convert(
            source,
            arguments.out,
            arguments.workers,
            arguments.max_bad_share,
            arguments.min_side,
            arguments.tokenizer,
            Place(started.rank, started.world_size),
            parse_size(arguments.shard_size, "--shard-size"),
        )
    except TooManyBad:
        if started.is_first:
            raise
        sys.exit(REFUSED)  # all tasks find the same, and the first one says it
    if not started.is_first:
        return
    console = Console(highlight=False)
    table = Table(title=f"{arguments.out}: {type(source).__name__} converted", show_header=False)
    table.add_row("records", f"{info.records:,}")
    table.add_row("images", f"{info.images:,} ({info.image_bytes / 2**20:,.1f} MiB)")
    table.add_row("words per record", _spread(info.words))
    if info.tokens:
        table.add_row("text tokens per record", _spread(info.tokens))
    for reason, count in info.bad.items():
        table.add_row(f"[red]left out: {reason}", f"{count:,}")
    if info.duplicate_ids:
        table.add_row("[yellow]ids that occur again", f"{info.duplicate_ids:,}")
    table.add_row("fingerprint", info.fingerprint)
    console.print(table)
    if not info.images and not isinstance(source, Texts):
        console.print(f"[yellow]none of the {info.records:,} records has an image[/]: is that right?", soft_wrap=True)
    if info.bad:
        console.print(f"left-out records are listed in {arguments.out / 'bad_samples.jsonl'}", soft_wrap=True)


def _spread(values: dict[str, Any]) -> str:
    if not values:
        return "-"
    return (
        f"mean {values['mean']}, median {values['median']:.0f}, 95 % below {values['p95']:.0f}, at most {values['max']}"
    )
