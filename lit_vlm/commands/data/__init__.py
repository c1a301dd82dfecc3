"""`lit-vlm data`: one file for each of its verbs, with its arguments (`add`) and its work (`run`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lit_vlm.commands.data import caption, check, convert, curate, list_, stats, view

VERBS = {
    "list": list_,
    "convert": convert,
    "curate": curate,
    "caption": caption,
    "check": check,
    "stats": stats,
    "view": view,
}


def main(argv: Sequence[str]) -> None:
    """Run one of the verbs.

    Raises:
        ValueError: for a source, shard or config that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="lit-vlm data", description="List, convert, curate, caption, check and describe data.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=" | ".join(VERBS))
    for verb in VERBS.values():
        verb.add(verbs)
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb not in ("stats", "view"):  # which take the flags of a config, too
        parser.error(f"unknown arguments: {' '.join(rest)}")
    VERBS[arguments.verb].run(arguments, rest)
