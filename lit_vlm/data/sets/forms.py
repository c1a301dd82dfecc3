"""Forms of files: the source that reads a file, recognised by its ending and its first line, or named."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from jsonargparse import ArgumentParser

from lit_vlm.core.plugins import find_class
from lit_vlm.data.records.files import list_files, walk
from lit_vlm.data.records.media import IMAGE_SUFFIXES, is_nothing, unread_key
from lit_vlm.data.remote import choose, fetch, is_address, parse_address
from lit_vlm.data.sources import (
    Captions,
    ChatJsonl,
    LlavaJson,
    LlavaVideo,
    Mmc4,
    Parquet,
    Pictures,
    Source,
    Texts,
    WebDataset,
)

FORMS: dict[str, type[Source]] = {
    form.__name__: form
    for form in (LlavaJson, LlavaVideo, ChatJsonl, Parquet, WebDataset, Mmc4, Texts, Captions, Pictures)
}

BY_SUFFIX = {
    ".parquet": "Parquet",
    ".tar": "WebDataset",
    ".csv": "Captions",
    ".tsv": "Captions",
    ".txt": "Texts",
}

HEAD = 1 << 22
"""Bytes at the start of a JSON list in which its first entry is looked for."""
ADVICE = "name its form with --form"
"""Advice in the error for a file that is not recognised, in the flags of `lit-vlm data convert`."""


def open_source(path: str, form: str | None = None, settings: Sequence[str] = (), advice: str = ADVICE) -> Source:
    """Make the source that reads a path.

    Args:
        path: a file or folder, or the address of one; its files are fetched.
        form: class name, or the path of a `Source` with the argument `path`; recognised if not given.
        settings: further arguments of the class, each as `key=value`.
        advice: how to name the form, for the error.

    Raises:
        ValueError: for a path that does not exist, a form that is not recognised, or an argument that it does not have.
    """
    if not is_address(path) and not Path(path).exists():
        raise ValueError(f"there is no {path}")
    form = form or (recognise_address(path, advice) if is_address(path) else recognise(Path(path), advice))
    kind = find_class(form, Source, FORMS, "--form")  # type: ignore[type-abstract]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "source")
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


def recognise(path: Path, advice: str = ADVICE) -> str:
    """Class name of the source that reads a file or folder, by its ending and its first line.

    Args:
        path: the file or folder.
        advice: how to name the form, for the error.

    Raises:
        ValueError: when it is none of the known forms.
    """
    if path.is_dir():
        form = _of_folder({file.suffix.lower() for file in walk(path)}, str(path), advice)
        return form or _by_row(list_files(path, [".jsonl"])[0], advice)
    return _of_file(path.suffix.lower(), str(path), advice) or _by_row(path, advice)


def recognise_address(address: str, advice: str = ADVICE) -> str:
    """Class name of the source that reads an address; where that depends on a first line, the file is fetched for it.

    Args:
        address: of a file or folder, or of a data set of the hub.
        advice: how to name the form, for the error.

    Raises:
        ValueError: when it is none of the known forms, or nothing that may be read.
    """
    chosen = choose(parse_address(address))
    suffixes = {PurePosixPath(entry.path).suffix.lower() for entry in chosen.entries}
    if len(chosen.entries) == 1 and chosen.at == chosen.entries[0].path:
        return _of_file(suffixes.pop(), address, advice) or _by_row(fetch(address).path, advice)
    form = _of_folder(suffixes, address, advice)
    return form or _by_row(list_files(fetch(address, [".jsonl"]).path, [".jsonl"])[0], advice)


def form_of_files(files: Sequence[str], path: str, advice: str = ADVICE) -> str | None:
    """The form of a file, or of the files of a folder, by their endings; None where a first line says it.

    Raises:
        ValueError: when it is none of the known forms.
    """
    suffixes = {PurePosixPath(file).suffix.lower() for file in files}
    return _of_file(suffixes.pop(), path, advice) if len(files) == 1 else _of_folder(suffixes, path, advice)


def _of_folder(suffixes: set[str], path: str, advice: str) -> str | None:
    """The form of a folder by the endings of its files; None where the first line of a .jsonl file says it."""
    for suffix, form in ((".tar", "WebDataset"), (".parquet", "Parquet"), (".jsonl", None)):
        if suffix in suffixes:
            return form
    if suffixes & set(IMAGE_SUFFIXES):
        return "Captions" if ".txt" in suffixes else "Pictures"
    raise ValueError(f"{path} holds none of .tar, .parquet, .jsonl or images: {advice}")


def _of_file(suffix: str, path: str, advice: str) -> str | None:
    """The form of a file by its ending; None where its first line says it."""
    if suffix in (".jsonl", ".json"):
        return None
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    raise ValueError(f"{path}: the ending '{suffix}' is not known: {advice}")


def _by_row(path: Path, advice: str) -> str:
    """The form of a .jsonl or .json file, by its first row."""
    first = first_row(path)
    keys = set(first) if isinstance(first, dict) else set()
    held = {key for key in keys if not is_nothing(first[key])}
    if form := _form_of(held, keys) or _form_of(keys, keys):
        return form
    if path.suffix.lower() == ".json":
        return "LlavaJson"  # its error says what is wrong with the file
    if first is None:
        raise ValueError(f"{path} has no line of JSON")
    raise ValueError(
        f"{path}: a line with the keys {sorted(keys)} is not known. Known are messages, texts, or query and response "
        "(chat), conversations (LLaVA), video_id, q and a (Video-ChatGPT), text_list and image_info (MMC4), image and "
        f"caption (captions), inputs and targets or text (text only): {advice}" + _caption_advice(path, first)
    )


def _form_of(held: set[str], keys: set[str]) -> str | None:
    """Class name of the source that reads rows with these keys; None where no form has them.

    Args:
        held: keys of the row that hold something.
        keys: all keys of the row; those of an answer or of a list of pictures may hold nothing.
    """
    if "text_list" in held and "image_info" in keys:
        return "Mmc4"
    if held & {"messages", "texts"} or ("query" in held and "response" in keys):
        return "ChatJsonl"
    if {"video", "conversations"} <= held or {"video_id", "q"} <= held:
        return "LlavaVideo"
    if "conversations" in held:
        return "LlavaJson"
    if {"image", "caption"} <= held:
        return "Captions"
    if ("inputs" in held and "targets" in keys) or ("text" in held and not held & {"image", "images", "file_name"}):
        return "Texts"
    return None


def caption_settings(row: Any) -> tuple[str, ...]:
    """Arguments with which `Captions` reads a row with a picture and a text, as imagefolder's metadata.jsonl has them.

    Args:
        row: the first of a file.

    Returns:
        each as `key=value`; none for other rows.
    """
    image = unread_key(row, (), False) if isinstance(row, dict) else None
    text = next((key for key in ("caption", "text") if isinstance(row, dict) and isinstance(row.get(key), str)), None)
    return () if image is None or text is None else (f"image_column={image}", f"caption_column={text}")


def _caption_advice(path: Path, row: Any) -> str:
    """Advice for a file of pictures with captions whose keys have other names; "" for other files."""
    if not (settings := caption_settings(row)):
        return ""
    flags = " ".join(f"--set {setting}" for setting in settings)
    return f"; if it has a picture and its caption in each line, name the file {path} and --form Captions {flags}"


def first_row(path: Path) -> Any:
    """The first line that is JSON, or the first entry of a list; None where there is none."""
    with path.open("rb") as file:
        head = file.read(HEAD).decode("utf-8-sig", errors="replace").lstrip()
    if head.startswith("["):
        try:
            return json.JSONDecoder().raw_decode(head[1:].lstrip())[0]
        except (ValueError, RecursionError):
            return None
    with path.open("rb") as file:
        for line in file:
            try:
                return json.loads(line)
            except (ValueError, RecursionError):
                continue
    return None
