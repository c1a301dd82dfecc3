"""Files of hub models: one process of all that share a hub cache asks for them, and the others take what it found."""

from __future__ import annotations

import glob
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lit_vlm.core.cache import held
from lit_vlm.core.launcher import launch
from lit_vlm.core.written import write_whole

STARTED = time.time()
"""When this process began: what another one asked since then need not be asked again."""
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin")
SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of configurations and tokenizers."""
WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin", r".*\.safetensors", ".*")
"""Names of weight files: of the first pattern that fits one, all files that fit are fetched."""


def fetched(name: str, weights: bool, folders: Sequence[str] = ("",)) -> Path:
    """The folder of a hub model in the hub cache, after its files were fetched where they lack.

    Args:
        name: hub name.
        weights: whether weights are wanted besides configuration and tokenizer.
        folders: the folders of the repository whose files are wanted, without those below them; "" is the upper one.

    Raises:
        ValueError: in one line, where the hub does not give them and the hub cache does not hold them.
    """
    kind = "-".join([*(folder for folder in folders if folder), "weights" if weights else "settings"])

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        try:
            wanted = _wanted(_listed(name), weights, folders)
        except Exception as error:  # no network, no such name, not allowed, offline: each client has errors of its own
            return str(_cached(name, weights, folders, error))
        try:
            return snapshot_download(name, allow_patterns=[glob.escape(file) for file in wanted])
        except Exception as error:
            raise ValueError(f"{name} cannot be fetched from the hub: {reason(error)}") from error

    folder = Path(_once(name, kind, fetch))
    # What was found for another process may lie in a hub cache that is not this one's.
    return folder if folder.is_dir() else Path(fetch())


def hub_files(name: str) -> list[str]:
    """Paths of all files that the hub has under a name.

    Raises:
        ValueError: in one line, where the hub does not say.
    """

    def ask() -> list[str]:
        try:
            return _listed(name)
        except Exception as error:
            raise ValueError(
                f"the weights of {name} are not in the hub cache, and the hub does not list them: {reason(error)}"
            ) from error

    return list(_once(name, "files", ask))


def _listed(name: str) -> list[str]:
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(name)


def _wanted(files: Sequence[str], weights: bool, folders: Sequence[str]) -> list[str]:
    """Of the files of a repository, those that are read; of several forms of the same weights, one."""
    chosen = []
    for folder in folders:
        here = [file for file in files if PurePosixPath(file).parent == PurePosixPath(folder)]
        chosen += [file for file in here if file.endswith(SETTINGS)]
        stored = [file for file in here if file.endswith(WEIGHT_SUFFIXES)] if weights else []
        for pattern in WEIGHTS:
            if fitting := [file for file in stored if re.fullmatch(pattern, PurePosixPath(file).name)]:
                chosen += fitting
                break
    return chosen


def _cached(name: str, weights: bool, folders: Sequence[str], error: Exception) -> Path:
    """The folder of a model in the hub cache, which the hub says nothing of.

    Raises:
        ValueError: with the error's reason, where the cache lacks what is wanted.
    """
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / constants.DEFAULT_REVISION
    folder = repository / "snapshots" / (reference.read_text() if reference.is_file() else "none")
    there = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    found = _wanted(there, weights, folders)
    if not found or (weights and not any(file.endswith(WEIGHT_SUFFIXES) for file in found)):
        what = "the weights of " if weights and found else ""
        raise ValueError(f"{what}{name} cannot be fetched from the hub: {reason(error)}") from error
    return folder


def reason(error: Exception) -> str:
    """Why the hub gave nothing, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
        return (
            "its authors want an agreement first: accept it on the page of the model, and log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{constants.ENDPOINT} has no such name, or none that you may see: check the spelling, or log in with "
            "`hf auth login`; a local folder needs a path that exists"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the hub cache does not hold it"
    return next(iter(str(error).strip().splitlines()), repr(error))


def _once(name: str, kind: str, ask: Callable[[], Any]) -> Any:
    """The answer to a question, which one process asks for all that share the hub cache and run at the same time.

    Args:
        name: hub name that the question is about.
        kind: which question it is.
        ask: gives an answer that JSON can hold, or raises a ValueError, which the others raise as well.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ask()
    place = Path(constants.HF_HUB_CACHE) / ".locks" / f"models--{name.replace('/', '--')}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        may_write = os.access(place, os.W_OK)
    except OSError:
        may_write = False
    if not may_write:  # a hub cache that is only read
        return ask()
    return once(place / f"lit-vlm-{kind}.json", f"fetches {name}", ask)


def once(note: Path, doing: str, ask: Callable[[], Any]) -> Any:
    """The answer to a question, which one process asks for all that share a folder and run at the same time.

    Args:
        note: file in that folder, `.json`, that the answer is kept in.
        doing: what the process does that asks, for the line of those that wait: "fetches some/model".
        ask: gives an answer that JSON can hold, or raises a ValueError, which the others raise as well.
    """
    with held(note.with_suffix(".lease"), doing):
        answer = _noted(note)
        if answer is None:
            try:
                answer = {"found": ask()}
            except ValueError as error:
                answer = {"error": str(error)}
            write_whole(note, json.dumps({**answer, "time": time.time(), "by": _self(), "launch": _launch()}))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["found"]


def _noted(note: Path) -> dict[str, Any] | None:
    """What another process of this time was answered; None where this one shall ask.

    A process is of this time if it belongs to the same launch, or asked after this one began. A process that asks again
    after an error of its own is given a new answer.
    """
    try:
        noted: dict[str, Any] = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    together = noted["launch"] is not None and noted["launch"] == _launch()
    if not (together or noted["time"] >= STARTED) or ("error" in noted and noted["by"] == _self()):
        return None
    return noted


def _self() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _launch() -> str | None:
    """The launch and the attempt of this process; None where it was started alone."""
    started = launch()
    if started.by not in ("srun", "torchrun"):
        return None
    # Without a name, processes of one torchrun have their parent in common.
    return f"{started.id or f'{socket.gethostname()} {os.getppid()}'} {started.attempt}"
