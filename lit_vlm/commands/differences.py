"""The settings in which two resolved configs differ, however their sources and classes are written."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_vlm.commands.config_parser import KEYS
from lit_vlm.data.sources.base import name_of

CLASS = ""
"""The key of an object's class in the tree of its settings."""
MISSING = "–"
Sources = Sequence[tuple[str | None, Any]]
"""Pairs of a source's name, None for a source without one, and the tree of its settings."""


@dataclass(frozen=True)
class Row:
    """A setting that differs: its key as a flag has it, and its value on either side."""

    key: str
    first: str
    second: str


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Row]:
    """Settings that differ, in reading order."""
    trees = [_settings_tree(settings) for settings in (first, second)]
    for key in KEYS:
        name = key.partition(".")[2]
        one = _called(_sources(first["data"][name]), _sources(second["data"][name]))
        other = _called(_sources(second["data"][name]), one)
        trees[0]["data"][name], trees[1]["data"][name] = _by_name(one), _by_name(other)
    yield from _compare(trees[0], trees[1], "")


def _settings_tree(settings: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("model", "data", "trainer", "checkpoint", "seed_everything")
    tree: dict[str, Any] = {key: _tree(settings[key]) for key in keys}
    tree["trainer"].pop("default_root_dir", None)  # the run's folder, which is no setting
    return tree


def _tree(value: Any) -> Any:
    """A value as nested mappings: an object of its class and arguments, a list of objects of their class names."""
    if isinstance(value, dict) and "class_path" in value:
        return {CLASS: value["class_path"], **{key: _tree(one) for key, one in (value.get("init_args") or {}).items()}}
    if isinstance(value, dict):
        return {key: _tree(one) for key, one in value.items()}
    if isinstance(value, list) and value and all(isinstance(one, dict) and "class_path" in one for one in value):
        return _by_name([(_short(one["class_path"]), _tree(one)) for one in value])
    return value


def _sources(given: Any) -> Sources:
    """Sources from a path, a mapping of names or a list; those of a list may have no name."""
    if isinstance(given, str):
        return [(name_of(given), given)]
    if isinstance(given, dict):
        return [(name, _without_name(_tree(one))) for name, one in given.items() if one is not None]
    return [((one.get("init_args") or {}).get("name"), _without_name(_tree(one))) for one in given or ()]


def _without_name(tree: Any) -> Any:
    return {key: one for key, one in tree.items() if key != "name"} if isinstance(tree, dict) else tree


def _called(own: Sources, other: Sources) -> list[tuple[str, Any]]:
    """Names for all sources: one without takes the name of an equal source, or one of its class, on the other side."""
    names = [name for name, _ in own]
    free = [(name, one) for name, one in other if name is None or name not in names]
    for fits in (_equal, _alike):
        for place, (_, tree) in enumerate(own):
            found = next((one for one in free if names[place] is None and fits(one[1], tree)), None)
            if found is not None:
                free.remove(found)
                names[place] = found[0] or _guessed(tree)
    return [(name or _guessed(tree), tree) for name, (_, tree) in zip(names, own, strict=True)]


def _equal(first: Any, second: Any) -> bool:
    return not list(_compare(first, second, ""))


def _alike(first: Any, second: Any) -> bool:
    return isinstance(first, dict) and isinstance(second, dict) and _same_class(first[CLASS], second[CLASS])


def _guessed(tree: Mapping[str, Any]) -> str:
    """A name for a source without one: the file that it reads, or its class."""
    path = tree.get("path")
    return name_of(path) if isinstance(path, str) else _short(tree[CLASS]).lower()


def _by_name(named: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in named:
        number, label = 1, name
        while label in found:
            number += 1
            label = f"{name}-{number}"
        found[label] = one
    return found


def _compare(first: Any, second: Any, key: str) -> Iterator[Row]:
    if not (isinstance(first, dict) and isinstance(second, dict)):
        if first != second:
            yield from _rows_of(first, second, key)
        return
    if not _same_class(first.get(CLASS), second.get(CLASS)):
        called = [_short(one[CLASS]) if CLASS in one else _told(one) for one in (first, second)]
        yield Row(key, *(called if called[0] != called[1] else (first[CLASS], second[CLASS])))
    for name in [*first, *(name for name in second if name not in first)]:
        inner = f"{key}.{name}" if key else name
        if name == CLASS:
            continue
        if name in first and name in second:
            yield from _compare(first[name], second[name], inner)
        elif name in first and not _is_default(first, name):
            yield from _rows_of(first[name], _Missing, inner)
        elif name in second and not _is_default(second, name):
            yield from _rows_of(_Missing, second[name], inner)


class _Missing:
    """Stands for a value that one side does not have."""


def _rows_of(first: Any, second: Any, key: str) -> Iterator[Row]:
    """Rows of a value that is a mapping on one side at most; arguments at their defaults are left out."""
    value = first if isinstance(first, dict) else second
    if not isinstance(value, dict) or not value:
        yield Row(key, _told(first), _told(second))
        return
    if CLASS in value:
        yield Row(key, *(_short(one[CLASS]) if one is value else _told(one) for one in (first, second)))
    for name, one in value.items():
        if name != CLASS and not _is_default(value, name):
            sides = (one, _Missing) if value is first else (_Missing, one)
            yield from _rows_of(sides[0], sides[1], f"{key}.{name}")


def _is_default(tree: Mapping[str, Any], name: str) -> bool:
    """Whether an argument of an object has its default value."""
    found = _class(tree.get(CLASS))
    parameter = inspect.signature(found).parameters.get(name) if found is not None else None
    default = None if parameter is None else parameter.default
    return parameter is not None and (list(default) if isinstance(default, tuple) else default) == tree[name]


def _same_class(first: str | None, second: str | None) -> bool:
    return first == second or (_class(first) is not None and _class(first) is _class(second))


def _class(path: str | None) -> Any:
    """The class of a path; None if it does not exist."""
    module, _, name = (path or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _told(value: Any) -> str:
    if value is _Missing:
        return MISSING
    if isinstance(value, str):
        return value.replace("\n", "\\n") or '""'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_told(one)}' for name, one in value.items())}}}"
    return str(value)
