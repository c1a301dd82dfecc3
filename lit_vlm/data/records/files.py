"""Rules for which files of a folder are data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

LEFT_BY_SYSTEMS = frozenset(
    {"__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "@eaDir"}
)
"""Names that macOS, Windows and network storage put into folders; their other files begin with a dot."""


def is_hidden(path: PurePath) -> bool:
    """Whether a path is hidden, and so no data.

    It is where a part of it begins with a dot (`.ipynb_checkpoints`, `._a.png`, `.DS_Store`) or is one of
    `LEFT_BY_SYSTEMS`.

    Args:
        path: relative to the folder that is read.
    """
    return any(part.startswith(".") or part in LEFT_BY_SYSTEMS for part in path.parts)


def visible(files: Iterable[Path]) -> list[Path]:
    """The files whose own names are not hidden, sorted."""
    return sorted(file for file in files if not is_hidden(PurePath(file.name)))


def walk(folder: Path, links: bool = False, skipped: list[Path] | None = None) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden. The folder itself may lie below a hidden one.

    A link with a name that is not hidden is followed into a hidden folder of `folder`, as it does not leave `folder`.

    Args:
        folder: where to look.
        links: whether folders that are reached by links out of `folder` are walked, too.
        skipped: links to folders that were not followed are added here.
    """
    root = folder.resolve()
    seen = {root}
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        entered = []
        for name in folders:
            target, link = (here / name).resolve(), (here / name).is_symlink()
            inside = target.is_relative_to(root)
            walked = link and inside and not is_hidden(target.relative_to(root))
            if is_hidden(PurePath(name)) or walked or target in seen:
                continue  # a link back into what is walked would give the same files again
            if not link or inside or links:
                entered.append(name)
                seen.add(target)
            elif skipped is not None:
                skipped.append(here / name)
        folders[:] = entered
        yield from (here / name for name in files if not is_hidden(PurePath(name)) and (here / name).is_file())


def list_files(path: Path, suffixes: Sequence[str], links: bool = False) -> list[Path]:
    """The file itself, or the files in and below a folder that end in one of `suffixes`, sorted.

    Args:
        path: a file, or a folder whose hidden files are no data.
        suffixes: in small letters, with the dot.
        links: whether folders that are reached by links are read, too.

    Raises:
        ValueError: when there is no such file, or when some lie behind a link that may not be followed.
    """
    if path.is_file():
        return [path]
    endings = tuple(suffixes)
    skipped: list[Path] = []
    files = sorted(file for file in walk(path, links, skipped) if file.name.lower().endswith(endings))
    for link in skipped:
        if missed := next((file for file in walk(link) if file.name.lower().endswith(endings)), None):
            raise ValueError(
                f"{path} has files behind a link to another folder, as {missed}: allow_links: true of the source "
                "(--set allow_links=true) reads them, where the source has it; or name that folder itself"
            )
    if not files:
        raise ValueError(f"there is no {' or '.join(suffixes)} file in {path}")
    return files
