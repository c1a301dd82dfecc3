"""`lit-vlm serve`: trained models behind OpenAI's chat API."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

from lit_vlm.commands.named_runs import RUN_HELP, name_checkpoint
from lit_vlm.core.bits import Kind

WHOLE_HOST = re.compile(r"https?://[^/@?#]+/")


def main(argv: Sequence[str]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        ValueError: for a run that cannot be loaded, a device that is not there, a port that is taken, or a package that
            is not installed.
    """
    arguments = _parser().parse_args(argv)
    for flag in ("max_new_tokens", "batch_size", "max_megabytes", "timeout"):
        if getattr(arguments, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, not {getattr(arguments, flag)}")
    for prefix in arguments.allow_url:
        if not WHOLE_HOST.match(prefix):
            raise ValueError(
                f"--allow-url {prefix}: expected https://HOST/ or https://HOST/FOLDER/; without the / behind the host "
                "other hosts begin in the same way"
            )
    import torch

    from lit_vlm.core.quantised import check_kind
    from lit_vlm.evaluation.asker import pick_device

    check_kind(arguments.quantise, "--quantise")
    sources = find_runs(arguments.checkpoint)
    devices = [torch.device(pick_device(name)) for name in arguments.device or [None]]
    import_server().serve(
        sources,
        devices,
        host=arguments.host,
        port=arguments.port,
        batch_size=arguments.batch_size,
        most_tokens=arguments.max_new_tokens,
        timeout=arguments.timeout,
        max_megabytes=arguments.max_megabytes,
        prefixes=arguments.allow_url,
        quantise=arguments.quantise,
    )


def find_runs(checkpoints: Sequence[str]) -> dict[str, str]:
    """Checkpoints by the names that clients call them by, which are the paths as they were given.

    Raises:
        ValueError: for one that is named twice, or cannot be asked.
    """
    from lit_vlm.evaluation.asker import check_run

    names = [Path(source).as_posix() for source in checkpoints]
    if len(set(names)) < len(names):
        raise ValueError("a checkpoint is named twice")
    sources = {name: name_checkpoint(name) for name in names}
    for source in sources.values():
        check_run(source)
    return sources


def import_server() -> ModuleType:
    """The module `lit_vlm.serving.server`.

    Raises:
        ValueError: for a package of the extra `serve` that is not installed.
    """
    try:
        return import_module("lit_vlm.serving.server")
    except ModuleNotFoundError as error:
        raise ValueError(f"this needs {error.name}: pip install 'lit-vlm[serve]'") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm serve",
        description="Answer /v1/chat/completions and /v1/models in OpenAI's form, with pictures as data: URIs. It is "
        "for evaluation and demonstrations; export a model as llava-hf for servers of production.",
    )
    add = parser.add_argument
    add("checkpoint", nargs="+", metavar="RUN", help=f"{RUN_HELP}; clients name it as model")
    add(
        "--host",
        default="127.0.0.1",
        choices=["127.0.0.1", "0.0.0.0", "::"],
        help="who may ask: this machine alone (default: 127.0.0.1), or all that reach it; there is no password",
    )
    add("--port", type=int, default=8000, help="from 1024 to 65535 (default: 8000)")
    add(
        "--device",
        action="append",
        help="cpu, cuda, cuda:1, ...; several times for several workers, such as one for each GPU, or two on a CPU "
        "(default: a GPU if there is one)",
    )
    add(
        "--quantise",
        choices=get_args(Kind),
        help="store the linear layers of all blocks in 4 or 8 bits, which takes less memory and no less time",
    )
    add("--batch-size", type=int, default=8, help="requests that are answered together (default: 8)")
    add("--max-new-tokens", type=int, default=512, help="length of an answer at most (default: 512)")
    add(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long a request may wait for its turn (default: 120)",
    )
    add("--max-megabytes", type=int, default=20, help="size of a request, pictures included (default: 20)")
    add(
        "--allow-url",
        action="append",
        default=[],
        metavar="PREFIX",
        help="fetch pictures from addresses that begin so, such as https://images.example.org/; may be given several "
        "times (default: none is fetched)",
    )
    return parser
