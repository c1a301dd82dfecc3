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
from lit_vlm.commands.workers import add_workers, engine_of
from lit_vlm.core.launcher import launch
from lit_vlm.core.sizes import parse_size
from lit_vlm.data.given import open_as
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.forms import FORMS
from lit_vlm.data.sources import Texts, Vetted
from lit_vlm.data.sources.provenance import Provenance


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
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a file or folder, or the address of one: hf://datasets/ORG/NAME, s3://, gs:// or https://; or a "
        "converted set, which is written anew",
    )
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
    parser.add_argument("--licence", help="kept in the set, as an SPDX identifier such as CC-BY-4.0 where there is one")
    parser.add_argument("--origin", metavar="ADDRESS", help="where SOURCE was published; kept in the set")
    parser.add_argument(
        "--revision", help="the version of it that was taken: a commit, a tag or a date; kept in the set"
    )
    parser.add_argument(
        "--deny", metavar="FILE", help="leave out records with the addresses, or pictures of the SHA-256, on its lines"
    )
    add_workers(parser)
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
    opened, started = open_as(arguments.source, arguments.form, arguments.set), launch()
    opened.provenance |= Provenance(arguments.licence, arguments.origin, arguments.revision)
    source = opened if arguments.deny is None else Vetted(opened, arguments.deny)
    try:
        with engine_of(arguments.on, arguments.workers) as engine:
            info = convert(
                source,
                arguments.out,
                engine,
                arguments.max_bad_share,
                arguments.min_side,
                arguments.tokenizer,
                parse_size(arguments.shard_size, "--shard-size"),
            )
    except TooManyBad:
        if started.is_first:
            raise
        sys.exit(REFUSED)  # all tasks find the same, and the first one says it
    if not started.is_first:
        return
    console = Console(highlight=False)
    table = Table(title=f"{arguments.out}: {type(opened).__name__} converted", show_header=False)
    table.add_row("records", f"{info.records:,}")
    table.add_row("images", f"{info.images:,} ({info.image_bytes / 2**20:,.1f} MiB)")
    table.add_row("words per record", _spread(info.words))
    if info.tokens:
        table.add_row("text tokens per record", _spread(info.tokens))
    for reason, count in info.bad.items():
        table.add_row(f"[red]left out: {reason}", f"{count:,}")
    if info.duplicate_ids:
        table.add_row("[yellow]ids that occur again", f"{info.duplicate_ids:,}")
    for key, value in info.provenance.known().items():
        table.add_row(key, value)
    table.add_row("fingerprint", info.fingerprint)
    console.print(table)
    if not info.images and not isinstance(opened, Texts):
        console.print(f"[yellow]none of the {info.records:,} records has an image[/]: is that right?", soft_wrap=True)
    if info.bad:
        console.print(f"left-out records are listed in {arguments.out / 'bad_samples.jsonl'}", soft_wrap=True)


def _spread(values: dict[str, Any]) -> str:
    if not values:
        return "-"
    return (
        f"mean {values['mean']}, median {values['median']:.0f}, 95 % below {values['p95']:.0f}, at most {values['max']}"
    )
