"""Which source reads a file: recognised by its ending and its first line, or named."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lit_vlm.data.sources import Captions, ChatJsonl, LlavaJson, Mmc4, Parquet, Pictures, Source, Texts, WebDataset
from lit_vlm.data.sources.base import IMAGE_SUFFIXES, list_files

FORMS: dict[str, type[Source]] = {
    form.__name__: form for form in (LlavaJson, ChatJsonl, Parquet, WebDataset, Mmc4, Texts, Captions, Pictures)
}


def open_source(path: str, form: str | None = None, settings: Sequence[str] = ()) -> Source:
    """A source by its path.

    Args:
        path: a file or folder.
        form: class name; recognised if not given.
        settings: `key=value` arguments of the class.

    Raises:
        ValueError: when the form is not recognised, or has no such argument.
    """
    if not Path(path).exists():
        raise ValueError(f"there is no {path}")
    form = form or recognise(Path(path))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FORMS[form], "source")
    words = [f"--source.path={path}"]
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write KEY=VALUE")
        words.append(f"--source.{key}={value}")
    try:
        return parser.instantiate_classes(parser.parse_args(words)).source
    except argparse.ArgumentError as error:
        raise ValueError(f"{form}: {error}") from error


def recognise(path: Path) -> str:
    """The form of a file or folder, by its ending and its first line.

    Raises:
        ValueError: when it is none of the known ones.
    """
    if path.is_dir():
        suffixes = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
        for suffix, form in ((".tar", "WebDataset"), (".parquet", "Parquet")):
            if suffix in suffixes:
                return form
        if ".jsonl" in suffixes:
            return _by_line(list_files(path, [".jsonl"])[0])
        if suffixes & set(IMAGE_SUFFIXES):
            return "Captions" if ".txt" in suffixes else "Pictures"
        raise ValueError(f"{path} holds none of .tar, .parquet, .jsonl or images: name its form with --form")
    by_suffix = {
        ".json": "LlavaJson",
        ".parquet": "Parquet",
        ".tar": "WebDataset",
        ".csv": "Captions",
        ".tsv": "Captions",
        ".txt": "Texts",
    }
    if path.suffix.lower() in by_suffix:
        return by_suffix[path.suffix.lower()]
    if path.suffix.lower() == ".jsonl":
        return _by_line(path)
    raise ValueError(f"{path}: the ending '{path.suffix}' is not known: name its form with --form")


def _by_line(path: Path) -> str:
    """The form of a .jsonl file, by its first line that is JSON."""
    with path.open("rb") as file:
        for line in file:
            try:
                first: Any = json.loads(line)
            except (ValueError, RecursionError):
                continue
            keys = set(first) if isinstance(first, dict) else set()
            if {"text_list", "image_info"} <= keys:
                return "Mmc4"
            if "messages" in keys:
                return "ChatJsonl"
            if "text" in keys or {"inputs", "targets"} <= keys:
                return "Texts"
            raise ValueError(
                f"{path}: a line with the keys {sorted(keys)} is not known. Known are messages (chat), text_list and "
                "image_info (MMC4), inputs and targets or text (text only): name the form with --form"
            )
    raise ValueError(f"{path} has no line of JSON")
