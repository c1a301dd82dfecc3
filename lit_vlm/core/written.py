"""Files and folders that are there whole or not at all, and reports, whose absence on a full disk ends no run."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

log = logging.getLogger(__name__)


def write_whole(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file, whole or not at all; of processes that write it at the same time, the last one wins.

    Args:
        path: the file; an earlier one stays until the new one is whole. Folders above it are made.
        content: its text, or a function that writes a file of this suffix, elsewhere.

    Raises:
        OSError: where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        if callable(content):
            content(scratch)
        else:
            scratch.write_text(content, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def check_new_folder(out: Path) -> None:
    """Refuse a folder that something would be mixed with.

    Raises:
        ValueError: for a file, or a folder that is not empty.
    """
    if out.is_file():
        raise ValueError(f"{out} is a file")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which gets that name at the end; after an error nothing is left behind.

    Raises:
        ValueError: as `check_new_folder`, or where it cannot be written.
    """
    check_new_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error}") from error
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's folders are closed to others
        scratch.replace(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_report(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file that training can do without, whole or not at all; one that cannot be written is warned of.

    Args:
        path: the file; an earlier one stays until the new one is whole.
        write: writes a file of this name and suffix, elsewhere.

    Returns:
        whether it was written.
    """
    try:
        write_whole(path, write)
    except OSError as error:
        log.warning("%s could not be written and is left out: %s", path, error)
        return False
    return True
