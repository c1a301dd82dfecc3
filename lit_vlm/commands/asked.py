"""What commands on a recipe have in common: the recipe first, its axes, and flags for its stages."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import NamedTuple

FLAGS_OF_RUN = "Any other flag is one of lit-vlm run: --data.batch_size 8, --1_align.trainer.max_steps 100, ..."
"""What the help of other commands says of flags."""


class Asked(NamedTuple):
    """The words of a command.

    Attributes:
        recipe: the recipe; None where none is named.
        options: the command's own options.
        flags: all others, which go to the stages.
    """

    recipe: str | None
    options: argparse.Namespace
    flags: list[str]

    @property
    def stages(self) -> list[str] | None:
        """The stages that are named; None for all."""
        return self.options.stages.split(",") if self.options.stages else None


def recipe_parser(command: str, usage: str, description: str, flags: str) -> argparse.ArgumentParser:
    """A parser with the axes of a recipe.

    Args:
        command: name of the command.
        usage: what may follow it; lines for several ways.
        description: what it does.
        flags: what becomes of all other flags.
    """
    ways = "\n       ".join(f"lit-vlm {command} {way}" for way in usage.splitlines())
    parser = argparse.ArgumentParser(
        prog=f"lit-vlm {command}", usage=ways, description=description, epilog=flags, allow_abbrev=False
    )
    parser.add_argument("--scale", help="how big it is: a file in the recipe's scales/ (default: the recipe's)")
    parser.add_argument("--strategy", help="how it is sharded: single, ddp, fsdp, hsdp (default: the recipe's)")
    parser.add_argument("--stages", help="only these, separated by commas (default: all)")
    return parser


def ask(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Asked:
    """Take a command line apart.

    Raises:
        ValueError: for a word that is neither a flag nor the value of one.
    """
    # The recipe is the first argument: behind a flag it could not be told from the flag's value.
    named = bool(argv) and not argv[0].startswith("-")
    options, flags = parser.parse_known_args(argv[1:] if named else argv)
    if bad := [flag for i, flag in enumerate(flags) if not flag.startswith("--") and not _is_value(i, flags)]:
        raise ValueError(f"{bad[0]!r} is neither a flag nor the value of one; the recipe is the first argument")
    return Asked(argv[0] if named else None, options, flags)


def _is_value(index: int, flags: Sequence[str]) -> bool:
    """Whether a word of a command line is the value of the flag in front of it."""
    return index > 0 and flags[index - 1].startswith("--") and "=" not in flags[index - 1]


def flags_for(stage: str, flags: Sequence[str], stages: Collection[str]) -> list[str]:
    """The flags of one stage: those for all stages, and those that begin with `--STAGE.`, without that."""
    chosen: list[str] = []
    mine = True
    for flag in flags:
        if flag.startswith("--"):
            first, _, rest = flag[2:].partition(".")
            mine = first not in stages or first == stage
            flag = f"--{rest}" if first in stages else flag
        if mine:
            chosen.append(flag)
    return chosen
