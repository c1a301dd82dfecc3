"""`lit-vlm data list`: what an address or path holds, before anything of it is fetched."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from shlex import quote
from typing import Any

from rich.console import Console
from rich.table import Table

from lit_vlm.core.launcher import launch
from lit_vlm.data.sets.listed import Held, look


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    parser = verbs.add_parser(
        "list",
        help="what an address or path holds, and which reader fits",
        description="Show configurations and splits, rows, columns, size and licence of data on the hub, in a bucket, "
        "on the web or on this machine, and the commands that read it. Nothing is fetched but what says so.",
    )
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        help="hf://datasets/ORG/NAME[@REVISION][#CONFIG[/SPLIT]], s3://, gs://, https:// or a path",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Look at an address, and say what it holds."""
    if not launch().is_first:
        return
    found = look(arguments.address)
    if arguments.json:
        print(json.dumps(asdict(found), indent=1))  # noqa: T201 - for programs
        return
    console = Console(highlight=False)
    columns = ("config", "split", "rows", "files", "size", "columns", "reader")
    table = Table(*columns, title=arguments.address)
    for one in found.held:
        table.add_row(
            one.config or "-",
            one.split or "-",
            "?" if one.rows is None else f"{one.rows:,}",
            f"{one.files:,}",
            _size(one.size),
            ", ".join(one.columns) or "-",
            one.form or "none",
        )
    console.print(table)
    if found.revision:
        console.print(f"revision {found.revision}", soft_wrap=True)
    console.print(f"licence: {found.licence or 'not said'}", soft_wrap=True)
    fitting = next((one for one in found.held if one.form), None)
    console.print(_advice(fitting), soft_wrap=True)


def _advice(one: Held | None) -> str:
    if one is None:
        return "no reader fits as it is; --form CLASS names one of your own (a Source with the argument 'path')"
    if one.form == "Converted":
        return f"a converted set: --data.train {one.address}"
    pairs = [setting.split("=", 1) for setting in one.settings]
    form = f" --form {one.form}" if pairs else ""
    named = form + "".join(f" --set {quote(f'{key}={value}')}" for key, value in pairs)
    keys = "".join(f" --data.train.NAME.{key} {quote(value)}" for key, value in pairs)
    by_name = f"--data.train null --data.train.NAME {one.form} --data.train.NAME.path {one.address}{keys}"
    convert = f"lit-vlm data convert {one.address} OUT{named}\n"
    if one.settings:
        return f"{convert}lit-vlm run RECIPE {by_name}"
    return f"{convert}lit-vlm run RECIPE --data.train {one.address}\n    or {by_name}"


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{count} B"
        amount /= 1024
    return f"{amount:.1f} TiB"
