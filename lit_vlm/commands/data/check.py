"""`lit-vlm data check`: verify a converted set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lit_vlm.commands.workers import add_workers, engine_of
from lit_vlm.core.launcher import launch
from lit_vlm.data.sets.check import check_set


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    parser = verbs.add_parser("check", help="verify a converted set", description="Verify a converted set.")
    parser.add_argument("set", metavar="SET", help="its folder or address")
    parser.add_argument("--decode", action="store_true", help="decode every image again, too")
    add_workers(parser)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Check a set; ends the process with 1 where something is wrong."""
    if not launch().is_first:
        return  # one process reads a set; it has `--workers`
    with engine_of(arguments.on, arguments.workers) as engine:
        problems = check_set(arguments.set, arguments.decode, engine)
    console = Console(highlight=False, soft_wrap=True)
    if not problems:
        console.print(f"[green]{arguments.set} is whole[/]")
        return
    for problem in problems[:20]:
        console.print(f"[red]{problem}[/]", soft_wrap=True)
    if len(problems) > 20:
        console.print(f"... and {len(problems) - 20} more")
    console.print(f"{arguments.set} is damaged: bring the files back as they were converted, or convert it anew")
    sys.exit(1)
