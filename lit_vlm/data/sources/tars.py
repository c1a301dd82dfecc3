"""Tar files with an image and its caption under one name, as img2dataset writes them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.records.files import is_hidden, list_files
from lit_vlm.data.records.media import IMAGE_SUFFIXES, MEDIA_FILE, refuse_marks, urls_of
from lit_vlm.data.sources.base import Lines, Source, parse_json


class WebDataset(Source):
    """Tars of img2dataset and WebDataset: `KEY.jpg` with its caption in `KEY.txt` or under a key of `KEY.json`.

    Only the tars' tables of contents are read at the start; files are then read where they lie.

    Args:
        path: a .tar file, or a folder of them.
        caption: the key of `KEY.json` that holds the caption, where there is no `KEY.txt`.
        prompt: the question that each caption answers; the template `plain` leaves it out.
        name: name of the source; default: that of the file or folder.

    Raises:
        ValueError: for a path that does not exist or holds no tar file, and for a file that is no plain tar.
    """

    path: Path

    def __init__(
        self, path: str, caption: str = "caption", prompt: str = "Describe the image.", name: str | None = None
    ) -> None:
        self.path = self._existing(path, [".tar"])
        self.caption, self.prompt = caption, prompt
        self._call(name)
        self.files = list_files(self.path, [".tar"])
        self.image_folder = self.path
        self._entries = Lines(
            json.dumps(entry).encode() for number, file in enumerate(self.files) for entry in _members(file, number)
        )

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        """A question with the image, and the caption as its answer.

        Raises:
            RecordError: for a key without image or caption, with files that are not read, or where the tar ends early.
        """
        entry = json.loads(self._entries[index])
        if "bad" in entry:
            raise RecordError(*entry["bad"])
        image = self._read(entry, entry["image"])
        question = Message("user", (Image(data=image), Text(f"\n{self.prompt}")))
        described = self._described(entry)
        answer = Message("assistant", (Text(self._caption(entry, described)),))
        return refuse_marks(Record(entry["key"], self.name, (question, answer), urls=urls_of(described)))

    def fingerprint(self) -> str:
        """SHA-256 of the tables of contents with the size of each file, and of the revision of fetched ones."""
        digest = hashlib.sha256(self._entries.fingerprint().encode())
        digest.update(repr([file.stat().st_size for file in self.files]).encode())
        return self._revised(digest.hexdigest()[:16])

    def _described(self, entry: dict[str, Any]) -> Any:
        """The content of `KEY.json`; empty where there is none, or none that is needed can be read."""
        if "json" not in entry:
            return {}
        try:
            return parse_json(self._read(entry, entry["json"]), f"{entry['key']}.json")
        except RecordError as error:
            if error.reason == "malformed" and "txt" in entry:
                return {}
            raise

    def _caption(self, entry: dict[str, Any], described: Any) -> str:
        text: Any
        if "txt" in entry:
            text = self._read(entry, entry["txt"]).decode("utf-8", errors="replace")
        else:
            text = described.get(self.caption) if isinstance(described, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise RecordError("malformed", f"{entry['key']} has no caption in .txt or under '{self.caption}' in .json")
        return text.strip()

    def _read(self, entry: dict[str, Any], span: list[int]) -> bytes:
        with self.files[entry["tar"]].open("rb") as file:
            file.seek(span[0])
            content = file.read(span[1])
        if len(content) < span[1]:
            raise RecordError("truncated_file", f"{self.files[entry['tar']]} ends inside {entry['key']}")
        return content


def _members(file: Path, number: int) -> Iterator[dict[str, Any]]:
    """Yield an entry with the files of each key, in order; a tar that ends early gives what it has, and a bad entry."""
    found: dict[str, dict[str, Any]] = {}
    problem = None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                _note(member, found, number)
            problem = _unread(file, tar.offset)
    except tarfile.TarError as error:
        if not found:
            raise ValueError(f"{file} is no plain tar file ({error}); compressed tars must be unpacked") from error
        problem = str(error)
    for entry in found.values():
        if "image" not in entry and "bad" not in entry:
            entry["bad"] = ("missing_image", f"{entry['key']} has no image in {file.name}")
        yield entry
    if problem is not None:
        yield {"key": f"{file.name}-end", "tar": number, "bad": ("truncated_file", f"{file}: {problem}")}


def _note(member: tarfile.TarInfo, found: dict[str, dict[str, Any]], number: int) -> None:
    """Add an image, caption or JSON file to the entry of its key; links, second files of a kind and films are refused.

    Hidden members, such as macOS's `._KEY.jpg`, are no data.
    """
    key, _, ending = member.name.rpartition(".")
    kind = "image" if f".{ending.lower()}" in IMAGE_SUFFIXES else ending.lower()
    film = MEDIA_FILE.search(member.name.lower()) is not None and kind != "image"
    if member.isdir() or not (film or kind in ("image", "txt", "json")) or is_hidden(PurePosixPath(member.name)):
        return
    entry = found.setdefault(key, {"key": key, "tar": number})
    if film:
        entry["bad"] = ("unread_media", f"{member.name} is a film, a sound or a picture of a kind that is not read")
    elif not member.isfile():
        entry["bad"] = ("outside_folder", f"{member.name} is a link, not a file")
    elif kind in entry:
        entry["bad"] = ("malformed", f"{member.name}: there is more than one {kind} under this key")
    entry[kind] = (member.offset_data, member.size)


def _unread(file: Path, end: int) -> str | None:
    """The problem behind the last member that was read, or None: the reader stops without an error at a bad header."""
    with file.open("rb") as stream:
        stream.seek(end)
        rest = stream.read(1 << 16)
    if len(rest) < 512:
        return "the file ends without the mark of its end"
    return "there is data behind what could be read" if rest.strip(b"\0") else None
