"""Sources as a config gives them: by name, as a list, or as the path of a file whose reader is recognised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import register_type

from lit_vlm.data.remote import SCHEMES, holds, is_address, parse_address
from lit_vlm.data.sets.forms import ADVICE, open_source
from lit_vlm.data.sources import Converted, Source
from lit_vlm.data.sources.converted import INFO


class DataPath:
    """The path of a file or folder that a source is made of.

    Args:
        path: the path. A text that begins like JSON is refused, as it is meant as sources.

    Raises:
        ValueError: for an empty text, JSON, or another type.
    """

    def __init__(self, path: str) -> None:
        if not isinstance(path, str) or path.lstrip()[:1] in ("[", "{", ""):
            raise ValueError(f"{path!r} is not the path of a file or folder")
        self.path = path

    def __str__(self) -> str:
        return self.path


register_type(DataPath)

Given = dict[str, Source | DataPath | None] | list[Source] | DataPath
"""Values that `data.train` and `data.val` take; a source that is null is left out."""


def as_sources(given: Given | None, key: str) -> list[Source]:
    """The sources of a key, in order. Sources of a mapping get their keys as names.

    Args:
        given: name → source, a list of sources, or the path of a single one.
        key: `data.train` or `data.val`, for errors.

    Raises:
        ValueError: for a path that is not there, or whose reader is not recognised, and for a name with a dot.
    """
    if given is None:
        return []
    if isinstance(given, DataPath):
        return [_opened(given, key)]
    if not isinstance(given, dict):
        return list(given)
    return [_named(name, source, key) for name, source in given.items() if source is not None]


def _named(name: str, given: Source | DataPath, key: str) -> Source:
    if "." in name:
        raise ValueError(
            f"{key} has the name '{name}'; names have no dot, as flags (--{key}.NAME.path) take them apart"
        )
    source = _opened(given, f"{key}.{name}") if isinstance(given, DataPath) else given
    source.name, source.named = name, True
    return source


def _opened(given: DataPath, key: str) -> Source:
    """The source that reads a path or address: a converted set, or files as `lit-vlm data convert` would read them."""
    named = key if key.count(".") > 1 else f"{key}.NAME"
    try:
        return open_path(given.path, f"name its reader, as in --{named} LlavaJson --{named}.path {given.path}")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def open_path(path: str, advice: str) -> Source:
    """The source that reads a path or address: a converted set, or files as `lit-vlm data convert` would read them.

    Args:
        path: of a file or folder, or an address.
        advice: how to name the reader, for the error.

    Raises:
        ValueError: as `Converted` and `open_source`.
    """
    path = os.path.expanduser(path)
    return Converted(path) if _is_converted(path) else open_source(path, advice=advice)


def open_as(path: str, form: str | None, settings: Sequence[str]) -> Source:
    """The source that the flags `--form` and `--set` of a command name; without them, as `open_path`.

    Args:
        path: of a file or folder, or an address.
        form: as in `open_source`.
        settings: as in `open_source`.

    Raises:
        ValueError: as `open_source` and `open_path`.
    """
    return open_source(path, form, settings) if form or settings else open_path(path, ADVICE)


def _is_converted(path: str) -> bool:
    if not is_address(path):
        return (Path(path) / INFO).is_file() or (":" in path.split("/", 1)[0] and not Path(path).exists())
    scheme = path.partition("://")[0].lower()
    # LitData reads converted sets from more kinds of storage than files are fetched from.
    return scheme not in SCHEMES or holds(parse_address(path), INFO)
