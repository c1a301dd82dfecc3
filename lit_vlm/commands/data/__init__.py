"""`lit-vlm data`: one file for each of its verbs, with its arguments (`add`) and its work (`run`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lit_vlm.commands.data import check, convert, list_, stats

VERBS = {"list": list_, "convert": convert, "check": check, "stats": stats}


def main(argv: Sequence[str]) -> None:
    """Run one of the verbs.

    Raises:
        ValueError: for a source, shard or config that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="lit-vlm data", description="List, convert, check and describe data.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(VERBS))
    for verb in VERBS.values():
        verb.add(verbs)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb != "stats":  # which takes the flags of a config, too
        parser.error(f"unknown arguments: {' '.join(rest)}")
    VERBS[arguments.verb].run(arguments, rest)
