"""Stages by LightningCLI: flags are parsed, checked and run from here; its libraries are loaded when asked for."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple

from lit_vlm.core.launcher import launch
from lit_vlm.core.plugins import load_plugins, use_plugins

QUIET = ("lightning.pytorch", "lightning.fabric", "torch._subclasses.fake_tensor")
"""Loggers that are silent while a stage is checked, as they speak of devices, seeds and kernels."""
REFUSED = 1
"""Exit code of a command that refuses a flag, a file or the data, and says why in one line."""


def take_plugins(arguments: list[str]) -> list[str]:
    """Make the plugins of `--plugins A,B` known; returns the other arguments of the command.

    Raises:
        ValueError: without a value, or for one that is no name of a module.
    """
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--plugins":
            named = value if equals else next(words, "")
            if not named or named.startswith("-"):
                raise ValueError("--plugins needs a value behind it: modules, separated by commas")
            use_plugins(named.split(","))
        else:
            kept.append(word)
    return kept


@contextmanager
def in_one_line() -> Iterator[None]:
    """A context that prints a ValueError or OSError in one line, without traceback, and exits."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LIT_VLM_DEBUG"):
            raise
        sys.stderr.write(f"\nerror: {error}\n(set LIT_VLM_DEBUG=1 for the traceback)\n")
        raise SystemExit(REFUSED) from error


def lightning_cli(arguments: Sequence[str], run: bool = True) -> Any:
    """Parse config files and flags, and run the subcommand, or with `run=False` only parse and build objects.

    Raises:
        ValueError: for a wrong flag or key, and for anything that training refuses.
    """
    quiet()
    if run and int(os.environ.get("LOCAL_RANK", launch().local_rank)) == 0:
        sys.stderr.write("loading libraries ...\n")  # which takes ten seconds
    from lit_vlm.commands.lightning_cli import LitVLMCLI

    # Lightning warns if `args` come beside a command line; None makes it read the command line itself.
    given = take_plugins(list(arguments))
    load_plugins()  # their classes go by their bare names
    return LitVLMCLI(args=None if given == sys.argv[1:] else given, run=run)


def unlaunched() -> list[str]:
    """Flags by which Lightning ignores who started this process, for commands that do not train."""
    if launch().by not in ("srun", "torchrun"):
        return []
    return ["--trainer.plugins", "lightning.pytorch.plugins.environments.LightningEnvironment"]


class Checked(NamedTuple):
    """What the flags of a stage say.

    Attributes:
        start_from: where its weights start from.
        gpus: number of GPUs, or 0 on other devices.
        per_node: GPUs of a machine.
        gpu: name of the GPU of this process; empty without.
        gpu_bytes: its memory.
    """

    start_from: str | None
    gpus: int = 0
    per_node: int = 0
    gpu: str = ""
    gpu_bytes: int = 0


def check_flags(arguments: Sequence[str]) -> Checked:
    """Parse the flags of a stage and build its objects; no parts, no weights, and no source, whose file may be large.

    Raises:
        ValueError: for a wrong flag.
    """
    quiet()
    words = take_plugins(list(arguments))
    with quietly():
        import torch

        from lit_vlm.commands.lightning_cli import CheckedCLI

        load_plugins()
        cli = CheckedCLI([*words, "--trainer.logger", "false"])
        start: str | None = cli.model.stage.start_from
        device = cli.trainer.strategy.root_device
        if device.type != "cuda":
            return Checked(start)
        card = torch.cuda.get_device_properties(device)
        per_node = len(cli.trainer.device_ids)
        return Checked(start, per_node * cli.trainer.num_nodes, per_node, card.name, card.total_memory)


@contextmanager
def quietly() -> Iterator[None]:
    """A context without what libraries say of devices, seeds and kernels."""
    logs = [logging.getLogger(name) for name in QUIET]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def quiet() -> None:
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
        ".*`srun` command is available on your system but is not used.*",  # training.launched refuses what needs it
    ):
        warnings.filterwarnings("ignore", message=message)
