"""`lit-vlm`: Lightning's fit, validate, test and predict, and the kit's own verbs."""

from __future__ import annotations

import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_vlm import __version__
from lit_vlm.core.plugins import find_class, load_plugins, use_plugins

VERBS = {
    "run": "run the stages of a recipe, one after the other",
    "compare": "show what finished runs reached, side by side",
    "probe": "find out what can be read from a decoder's layers about depth, objects or whole pictures",
    "evaluate": "score a checkpoint on benchmarks, with or without demonstrations",
    "chat": "ask a trained model about pictures",
    "data": "convert data to shards, check them, show what is in them",
    "inspect": "show one batch as the model sees it",
    "prepare": "compute features of teachers or of a frozen encoder before training",
    "export": "write a checkpoint in a published format",
    "sync": "send what runs could not report to MLflow",
    "parts": "list all that a recipe or a flag can name, with one line each",
    "doctor": "report versions, devices and optional packages",
}
LIGHTNING = {
    "fit": "train one stage from config files",
    "validate": "held-out losses of a checkpoint",
    "test": "the same, under the name test",
    "predict": "answer the held-out questions",
}
RUN_FOLDER = "LIT_VLM_RUN_FOLDER"
REFUSED = 1
"""Exit code of a command that refuses a flag, a file or the data, and says why in one line."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script.

    Raises:
        SystemExit: when a command refuses its flags, files or data.
    """
    _working_folder_last()
    arguments = _take_plugins(list(sys.argv[1:] if argv is None else argv))
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        _print_help()
    elif verb == "--version":
        sys.stdout.write(f"lit-vlm {__version__}\n")
    elif verb in VERBS or verb in LIGHTNING:
        _run(verb, arguments)
    else:
        _run_brought(verb, arguments[1:])


def _working_folder_last() -> None:
    """Let users' modules be imported from the working folder, but none in place of `callbacks` or a library.

    `python -m` puts the working folder in front of all others, and a console script leaves it out.
    """
    here = os.getcwd()
    sys.path[:] = [*(folder for folder in sys.path if folder not in ("", here)), here]


def _run(verb: str, arguments: list[str]) -> None:
    """Run one of the kit's commands."""
    with _in_one_line():
        if verb in VERBS:
            importlib.import_module(f"lit_vlm.commands.{verb}").main(arguments[1:])
        else:
            lightning_cli(arguments)


def _run_brought(verb: str, arguments: list[str]) -> None:
    """Run a command of another package."""
    from lit_vlm.commands.verb import Verb

    with _in_one_line():
        find_class(verb, Verb, {}, "lit-vlm COMMAND", [*VERBS, *LIGHTNING])().main(arguments)  # type: ignore[type-abstract]


def _take_plugins(arguments: list[str]) -> list[str]:
    """Make the plugins of `--plugins A,B` known; returns the other arguments of the command."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--plugins":
            use_plugins((value if equals else next(words, "")).split(","))
        else:
            kept.append(word)
    return kept


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A context that prints a ValueError or OSError in one line, without traceback, and exits."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LIT_VLM_DEBUG"):
            raise
        sys.stderr.write(f"\nerror: {error}\n(set LIT_VLM_DEBUG=1 for the traceback)\n")
        raise SystemExit(REFUSED) from error


def _print_help() -> None:
    lines = ["usage: lit-vlm COMMAND ...", "", "train and evaluate vision-language models", ""]
    for title, verbs in (("recipes and models", VERBS), ("single stages (LightningCLI)", LIGHTNING)):
        lines.append(f"{title}:")
        lines += [f"  {verb:10} {text}" for verb, text in verbs.items()]
        lines.append("")
    lines.append("lit-vlm COMMAND --help explains each. A command of another package is named by its class path, or by")
    lines.append("its name with --plugins MODULE, which every command takes.")
    sys.stdout.write("\n".join(lines) + "\n")


def lightning_cli(arguments: Sequence[str], run: bool = True) -> Any:
    """Parse config files and flags, and run the subcommand, or with `run=False` only parse and build objects.

    Raises:
        ValueError: for a wrong flag or key, and for anything that training refuses.
    """
    _quiet()
    if run and os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write("loading libraries ...\n")  # it takes ten seconds
    from lit_vlm.commands.lightning_cli import LitVLMCLI

    load_plugins()  # so that flags can name their classes by bare names

    # Lightning warns if `args` come beside a command line; None makes it read the command line itself.
    given = list(arguments)
    return LitVLMCLI(args=None if given == sys.argv[1:] else given, run=run)


def check_flags(arguments: Sequence[str]) -> None:
    """Parse the flags of a stage without building anything.

    Raises:
        SystemExit: for a wrong flag, after a line that says what is wrong.
    """
    _quiet()
    from lit_vlm.commands.lightning_cli import ParsedCLI

    with _in_one_line():
        load_plugins()
        ParsedCLI(list(arguments))


def run_folder_for(stage: str) -> str:
    """A new folder for a run that was given none; the same in all processes of the run."""
    if RUN_FOLDER not in os.environ:
        job = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID")
        os.environ[RUN_FOLDER] = str(Path("runs") / f"{stage}-{job or time.strftime('%Y%m%d-%H%M%S')}")
    return os.environ[RUN_FOLDER]


def _quiet() -> None:
    """Silence notices of libraries that a user of this kit cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for message in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*LightningCLI.s args parameter is intended to run.*",
        ".*does not have many workers.*",
        ".*It is recommended to use `self.log.*sync_dist.*",
        ".*is not a subclass of .LightningModule.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*could not find the monitored key.*",
        ".*module.s. in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()
