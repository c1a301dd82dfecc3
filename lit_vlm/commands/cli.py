"""`lit-vlm`: Lightning's fit, validate, test and predict, and the kit's own verbs."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from lit_vlm import __version__
from lit_vlm.commands.fit import in_one_line, lightning_cli, take_plugins
from lit_vlm.core.launcher import launch
from lit_vlm.core.plugins import find_class

VERBS = {
    "run": "run the stages of a recipe, one after the other",
    "ablate": "run variants of a recipe for several seeds, what they share once, and judge what they show",
    "submit": "run a recipe as a job of SLURM that goes on by itself when it is taken away",
    "status": "tell how runs are: step, speed, time left, queue, newest checkpoint, errors",
    "plan": "say what stages take: memory, time, cost, and what makes them fit",
    "bench": "measure stages on this machine: speed, memory, and where the time goes",
    "tune": "search learning rates and other settings of a recipe, by Optuna",
    "compare": "show what finished runs reached, side by side, and which differences are beyond chance",
    "probe": "find out what can be read from a decoder's layers about depth, objects or whole pictures",
    "evaluate": "score checkpoints on benchmarks, or on questions of your own, with or without demonstrations",
    "chat": "ask a trained model about pictures",
    "serve": "let clients of OpenAI's chat API ask trained models",
    "data": "choose records, convert them to shards, check these, show what is in them",
    "inspect": "show one batch as the model sees it, or in which settings two recipes or runs differ",
    "prepare": "compute features of teachers or of a frozen encoder before training",
    "export": "write a checkpoint in a published format",
    "sync": "send what runs could not report to MLflow",
    "parts": "list all that a recipe or a flag can name, with one line each",
    "doctor": "report versions, devices and optional packages; with --nodes, whether the machines of a job are well",
}
LIGHTNING = {
    "fit": "train one stage from config files",
    "validate": "held-out losses of a checkpoint",
    "test": "the same, under the name test",
    "predict": "answer the held-out questions",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script.

    Raises:
        SystemExit: when a command refuses its flags, files or data.
    """
    # torchao, which transformers and peft import where it is installed, registers types in a way that PyTorch warns of.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    if argv is None:  # a program of its own, and not called from one, whose paths are its own
        _working_folder_last()
    with in_one_line():
        arguments = take_plugins(list(sys.argv[1:] if argv is None else argv))
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
    from lit_vlm.core.progress import slowly  # rich, of which the working folder may have a namesake

    with in_one_line():
        if verb in VERBS:
            with slowly("loading libraries", launch().is_first):
                command = importlib.import_module(f"lit_vlm.commands.{verb}")
            command.main(arguments[1:])
        else:
            lightning_cli(arguments)


def _run_brought(verb: str, arguments: list[str]) -> None:
    """Run a command of another package."""
    from lit_vlm.commands.verb import Verb

    with in_one_line():
        find_class(verb, Verb, {}, "lit-vlm COMMAND", [*VERBS, *LIGHTNING])().main(arguments)  # type: ignore[type-abstract]


def _print_help() -> None:
    lines = ["usage: lit-vlm COMMAND ...", "", "train and evaluate vision-language models", ""]
    for title, verbs in (("recipes and models", VERBS), ("single stages (LightningCLI)", LIGHTNING)):
        lines.append(f"{title}:")
        lines += [f"  {verb:10} {text}" for verb, text in verbs.items()]
        lines.append("")
    lines.append("lit-vlm COMMAND --help explains each. A command of another package is named by its class path, or by")
    lines.append("its name with --plugins MODULE, which every command takes.")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
