"""What `lit-vlm run --dry-run` looks at: every stage parses, its parts build and fit, its data is there."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console

from lit_vlm.checkpoints.weights import find_start
from lit_vlm.commands.cli import lightning_cli
from lit_vlm.data.feed.usable import check_sources
from lit_vlm.model.build import build_on_meta


def check_recipe(commands: Mapping[str, Sequence[str]], console: Console) -> bool:
    """Check the stages and print what is missing.

    Args:
        commands: arguments of `lit-vlm` by stage.
        console: where the findings go.

    Returns:
        whether every stage could start.
    """
    ok = True
    for stage, words in commands.items():
        console.print(f"[bold]{stage}[/]  lit-vlm {shlex.join(words)}", soft_wrap=True, highlight=False)
        problem = _check(words, list(commands).index(stage) > 0)
        if problem:
            ok = False
            console.print(f"  [red]missing or wrong[/]: {problem}", soft_wrap=True, highlight=False)
        else:
            console.print("  [green]ready[/]: config parses, parts build, data is there")
    return ok


def _check(words: Sequence[str], later: bool) -> str | None:
    """What keeps a stage from starting, or None. A later one starts from weights that need not be there yet."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            flags = _without(words[1:], "--model.stage.start_from") if later else words[1:]
            cli = lightning_cli([*flags, "--trainer.logger", "false"], run=False)
        if not later and cli.model.stage.start_from:
            find_start(cli.model.stage.start_from)
        model = build_on_meta(cli.model.slots)
        cli.model.stage.freeze(model, cli.model.slots.removed_heads)
        cli.model.stage.make_optimizer(model)
        cli.model.model = model
        cli.datamodule.format.check_marks(cli.model.input_spec, "refuse")
        for key, sources in (("train", cli.datamodule.train_sources), ("val", cli.datamodule.val_sources)):
            check_sources(sources, cli.model.input_spec.known, f"data.{key}")
    except SystemExit:
        lines = [line for line in errors.getvalue().strip().splitlines() if line.strip()]
        return _tidy(lines)
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    return None


def _tidy(lines: Sequence[str]) -> str:
    """The last cause of a parser's error: it nests them, the outermost first."""
    return " ".join(line.strip(" -") for line in lines[-3:])[-600:] or "the config does not parse"


def _without(words: Sequence[str], flag: str) -> list[str]:
    kept = list(words)
    while flag in kept:
        index = kept.index(flag)
        del kept[index : index + 2]
    return kept
