"""`lit-vlm data stats`: histograms of a converted set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_vlm.commands.fit import lightning_cli, unlaunched
from lit_vlm.commands.workers import add_workers, engine_of
from lit_vlm.core.launcher import launch
from lit_vlm.data.sets.stats import draw, statistics_of, statistics_table
from lit_vlm.data.sources import Converted
from lit_vlm.data.sources.converted import SetInfo
from lit_vlm.data.sources.provenance import Provenance
from lit_vlm.model.build import build_on_meta


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    parser = verbs.add_parser(
        "stats",
        help="histograms of a converted set",
        description="Draw text lengths, image sizes and images per record of a converted set to a PNG, and print a "
        "table.",
        epilog="With the flags of lit-vlm fit (--config FILE ...) positions per sample and visual tokens per image of "
        "that model are added.",
    )
    parser.add_argument("set", metavar="SET", help="its folder or address")
    parser.add_argument("--png", type=Path, help="where to draw (default: SET/stats.png, or ./stats.png)")
    add_workers(parser)


def run(arguments: argparse.Namespace, config: Sequence[str]) -> None:
    """Measure a set, draw it, and print a table."""
    if not launch().is_first:
        return  # one process reads a set; it has `--workers`
    encode = None
    if config:
        cli = lightning_cli([*config, "--trainer.logger", "false", *unlaunched()], run=False)
        cli.model.model = build_on_meta(cli.model.slots)
        encode = cli.datamodule.sample_encoder(cli.model.input_spec)
    source = Converted(arguments.set)
    with engine_of(arguments.on, arguments.workers) as engine:
        statistics = statistics_of(source, engine, encode)
    png = arguments.png or (Path(arguments.set) if Path(arguments.set).is_dir() else Path()) / "stats.png"
    draw(statistics, png)
    console = Console(highlight=False)
    console.print(statistics_table(statistics))
    console.print(_provenance(source.info), soft_wrap=True, markup=False)
    console.print(f"drawn to {png}", soft_wrap=True)


def _provenance(info: SetInfo) -> str:
    """Lines of where the set comes from, and what was left out of it."""
    known = info.provenance.known()
    told = [f"{field.name}: {known.get(field.name, 'not recorded')}" for field in fields(Provenance)]
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in info.bad.items())
    return "\n".join([*told, f"left out: {left_out or 'none'}"])
