"""`lit-vlm data`: convert data into shards, check them, and show what is in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_vlm.commands.fit import REFUSED, lightning_cli, unlaunched
from lit_vlm.core.devices import cores
from lit_vlm.core.launcher import launch
from lit_vlm.data.sets.check import check_set
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.forms import FORMS, open_source
from lit_vlm.data.sets.shared import Place
from lit_vlm.data.sets.stats import draw, statistics_of, statistics_table
from lit_vlm.data.sources import Converted, Texts
from lit_vlm.model.build import build_on_meta


def main(argv: Sequence[str]) -> None:
    """Run one of convert, check and stats.

    Raises:
        ValueError: for a source, shard or config that cannot be used.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb != "stats":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if arguments.verb == "convert":
        _convert(arguments)
    elif not launch().is_first:
        return  # one process reads a set; it has `--workers`
    elif arguments.verb == "check":
        _check(arguments)
    else:
        _stats(arguments, rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm data", description="Convert, check and describe data.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="convert | check | stats")
    convert_ = verbs.add_parser(
        "convert",
        help="any of the known forms → LitData shards, every image verified",
        description="Convert a source to LitData shards that hold records and encoded images. Every image is decoded "
        "once; what cannot be used is listed in OUT/bad_samples.jsonl. A conversion that was stopped goes on with the "
        "same command, and all that run it at the same time, as under srun, share the work.",
        epilog=f"Forms: {', '.join(FORMS)}. The form is recognised by the file's ending and its first lines.",
    )
    convert_.add_argument("source", metavar="SOURCE", help="a file or folder")
    convert_.add_argument("out", metavar="OUT", type=Path, help="folder of the new set")
    convert_.add_argument(
        "--form", help="how to read SOURCE, if not as recognised: one of those below, or the class path of a source"
    )
    convert_.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of the form's class, e.g. image_folder=images",
    )
    convert_.add_argument(
        "--workers", type=int, default=len(cores()), help="processes of each task (default: one per core)"
    )
    convert_.add_argument(
        "--max-bad-share", type=float, default=0.05, help="share of unusable records above which it fails (0.05)"
    )
    convert_.add_argument(
        "--min-side", type=int, default=4, help="an image with a shorter side in pixels is unusable (4)"
    )
    convert_.add_argument(
        "--tokenizer", help="count text tokens with this tokenizer: a hub name, a folder or package:NAME"
    )
    check = verbs.add_parser("check", help="verify a converted set", description="Verify a converted set.")
    check.add_argument("set", metavar="SET", help="its folder or address")
    check.add_argument("--decode", action="store_true", help="decode every image again, too")
    check.add_argument("--workers", type=int, default=len(cores()), help="processes (default: one per core)")
    stats = verbs.add_parser(
        "stats",
        help="histograms of a converted set",
        description="Draw text lengths, image sizes and images per record of a converted set to a PNG, and print a "
        "table.",
        epilog="With the flags of lit-vlm fit (--config FILE ...) positions per sample and visual tokens per image of "
        "that model are added.",
    )
    stats.add_argument("set", metavar="SET", help="its folder or address")
    stats.add_argument("--png", type=Path, help="where to draw (default: SET/stats.png, or ./stats.png)")
    stats.add_argument("--workers", type=int, default=len(cores()), help="processes (default: one per core)")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
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


def _check(arguments: argparse.Namespace) -> None:
    problems = check_set(arguments.set, arguments.decode, arguments.workers)
    console = Console(highlight=False, soft_wrap=True)
    if not problems:
        console.print(f"[green]{arguments.set} is whole[/]")
        return
    for problem in problems[:20]:
        console.print(f"[red]{problem}[/]", soft_wrap=True)
    if len(problems) > 20:
        console.print(f"... and {len(problems) - 20} more")
    sys.exit(1)


def _stats(arguments: argparse.Namespace, config: Sequence[str]) -> None:
    encode = None
    if config:
        cli = lightning_cli([*config, "--trainer.logger", "false", *unlaunched()], run=False)
        cli.model.model = build_on_meta(cli.model.slots)
        encode = cli.datamodule.sample_encoder(cli.model.input_spec)
    statistics = statistics_of(Converted(arguments.set), arguments.workers, encode)
    png = arguments.png or (Path(arguments.set) if Path(arguments.set).is_dir() else Path()) / "stats.png"
    draw(statistics, png)
    console = Console(highlight=False)
    console.print(statistics_table(statistics))
    console.print(f"drawn to {png}", soft_wrap=True)
