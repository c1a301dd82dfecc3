"""JSON files that describe a set of records or features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def read_json(file: Path) -> Any:
    """Read a JSON file of a converted or prepared set.

    Raises:
        ValueError: when the file is damaged or cannot be read; names it.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): make the set again, or take the file from a copy") from error


def read_info(file: Path, kind: type[T], version: int) -> T:
    """Read the JSON file that describes a set.

    Args:
        file: the file.
        kind: dataclass with the file's keys, `version` among them.
        version: version of the format that this kit reads.

    Raises:
        ValueError: when the file is damaged or has another version; names it.
    """
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(raw).__name__}, not an object")
    if raw.get("version") != version:
        raise ValueError(
            f"{file} is of format {raw.get('version')}; this lit-vlm reads format {version}: make it again"
        )
    try:
        return TypeAdapter(kind).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise ValueError(f"{file} is damaged: {problems}") from error
