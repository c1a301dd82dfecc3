"""Curation files: YAML with sources and steps."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lit_vlm.core.plugins import find_class, nearest
from lit_vlm.data.curation.curate import Curation
from lit_vlm.data.curation.step import Step
from lit_vlm.data.feed.names import name_key
from lit_vlm.data.given import open_path
from lit_vlm.data.sets.forms import FORMS, open_source
from lit_vlm.data.sources import Converted, Source

T = TypeVar("T")
KEYS = ("sources", "steps", "seed")
READERS: dict[str, type[Source]] = {**FORMS, "Converted": Converted}


def read_curation(file: Path, steps: Mapping[str, type[Step]]) -> Curation:
    """Read a curation file.

    Args:
        file: YAML; `${oc.env:VARIABLE,default}` in it is filled in.
        steps: the kit's steps by their bare names.

    Raises:
        ValueError: for a file that is not there or no YAML, a key that is not known, and sources or steps that cannot
            be made; one line that names file and key.
    """
    raw = _parsed(file)
    _refuse_unknown(raw, KEYS, f"{file}")
    sources, given = raw.get("sources"), raw.get("steps")
    if not isinstance(sources, dict) or not sources:
        raise ValueError(f"{file}: sources is a mapping, name → path or reader, with at least one entry")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{file}: steps is a list of {{class_path, init_args}}, with at least one entry")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"{file}: seed is {seed!r}; expected a whole number, not negative")
    opened = tuple(_source(str(name), entry, f"{file}: sources.{name}") for name, entry in sources.items())
    _refuse_equal(opened, file)
    made = tuple(_made(entry, Step, steps, f"{file}: steps[{i}]") for i, entry in enumerate(given))  # type: ignore[type-abstract]
    return Curation(file.stem, opened, made, seed)


def _parsed(file: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {file}") from error
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {_one_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}; expected the keys {', '.join(KEYS)}")
    return {str(key): value for key, value in found.items()}


def _source(name: str, entry: Any, where: str) -> Source:
    """A source of a path, of `{path, form}`, or of `{class_path, init_args}`."""
    if not name.strip() or "/" in name or "." in name:
        raise ValueError(f"{where}: a name of a source has letters, and neither dots nor slashes")
    if isinstance(entry, dict) and "class_path" in entry:
        source = _made(entry, Source, READERS, where)  # type: ignore[type-abstract]
    else:
        given = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or not isinstance(given.get("path"), str):
            raise ValueError(f"{where} is {entry!r}; expected a path, {{path, form}} or {{class_path, init_args}}")
        _refuse_unknown(given, ("path", "form"), where)
        if not isinstance(form := given.get("form"), str | None):
            raise ValueError(f"{where}.form is {form!r}; expected the name of a form, such as LlavaJson")
        advice = "name its form, as in {path: ..., form: LlavaJson}"
        try:
            source = open_source(given["path"], form) if form else open_path(given["path"], advice)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    source.name, source.named = name, True
    return source


def _made(entry: Any, base: type[T], own: Mapping[str, type[T]], where: str) -> T:
    """An object of `{class_path, init_args}`, or of a bare name or class path."""
    given = {"class_path": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get("class_path"), str):
        raise ValueError(f"{where} is {entry!r}; expected {{class_path, init_args}}")
    _refuse_unknown(given, ("class_path", "init_args"), where)
    kind = find_class(given["class_path"], base, own, where)
    arguments = given.get("init_args") or {}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}.init_args is {arguments!r}; expected a mapping")
    _refuse_unknown(arguments, inspect.signature(kind).parameters, f"{where}.init_args of {kind.__name__}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it")
    try:
        made: T = parser.instantiate_classes(parser.parse_object({"it": arguments})).it
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{where} ({kind.__name__}): {_one_line(error)}") from error
    return made


def _refuse_unknown(given: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in given:
        if key not in names:
            raise ValueError(
                f"{where}: there is no key '{key}'{nearest(str(key), names)}; there are {', '.join(names) or 'none'}"
            )


def _refuse_equal(sources: Iterable[Source], file: Path) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        if (other := seen.setdefault(name_key(source.name), source.name)) != source.name:
            raise ValueError(
                f"{file}: sources names '{other}' and '{source.name}', which would be one name in a metric"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).replace('"it.', '"').replace("'it.", "'")
