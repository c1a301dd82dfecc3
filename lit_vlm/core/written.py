"""Files that report on a run: a full disk costs the file, never the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)


def write_report(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file that training can do without, whole or not at all; one that cannot be written is warned of.

    Args:
        path: the file; an earlier one stays until the new one is whole.
        write: writes a file of this name and suffix, elsewhere.

    Returns:
        whether it was written.
    """
    scratch = path.with_name(f".partial-{path.name}")
    try:
        write(scratch)
        scratch.replace(path)
    except OSError as error:
        log.warning("%s could not be written and is left out: %s", path, error)
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        return False
    return True
