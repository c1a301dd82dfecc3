"""What a source is: a list of records."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_vlm._moved import old_name
from lit_vlm.data.records import Record, RecordError
from lit_vlm.data.records.files import list_files
from lit_vlm.data.records.media import without_keys
from lit_vlm.data.remote import Fetched, fetch, is_address, origin_of, revision_of
from lit_vlm.data.sources.provenance import Provenance


class Source(ABC):
    """A list of records.

    Attributes:
        name: what samples, counts and losses are reported under. Two sources of one name are told apart by their paths
            (`lit_vlm.data.feed.names`).
        named: whether the user gave the name.
        path: the file or folder that is read, or the address of a set that is read where it lies; None for a source
            that reads none. Of an address whose files are fetched, it is their place in the cache folder.
        image_folder: what image paths are relative to.
        chunked: whether reading a record is much cheaper near the one that was read last, so that shuffling should
            follow the source's own `shuffled`.
        provenance: licence, origin and revision, as far as the source knows them by itself or was told.
        captions: what wrote its captions, where `lit-vlm data caption` did; see `SetInfo.captions`.
    """

    name: str
    named = False
    path: Path | str | None = None
    image_folder = Path()
    chunked = False
    provenance = Provenance()
    captions: Mapping[str, Any] | None = None
    _fetched: Fetched | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, bad ones included."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """The record at an index.

        Raises:
            RecordError: when the record is malformed.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content, kept with the run: equal for equal data."""

    def outline(self, index: int) -> Record:
        """The record without the bytes of its images, for a pass over all texts.

        Raises:
            RecordError: as `record`.
        """
        return self.record(index)

    def repeats(self) -> NDArray[np.int64] | None:
        """For each record, the index of the first one that differs from it in nothing but its id: `[n]`.

        None where that is not known, as usual. A pass over all texts then measures equal records once.
        """
        return None

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """All indices in random order: `[n]`."""
        return generator.permutation(len(self))

    def places(self) -> list[Path | str]:
        """Files, folders and addresses that records are read from; a source that is made of others has theirs."""
        # Pictures of a source that names no folder are in its records, or beside the file.
        return [place for place in (self.path, self.image_folder) if place is not None and place != Path()]

    def _call(self, name: str | None) -> None:
        """Set the name: the given one, or that of the path (`name_of`)."""
        self.named = name is not None
        fetched = self._fetched.name if self._fetched else name_of(str(self.path))
        self.name = name if name is not None else fetched

    def _existing(self, path: str, endings: Sequence[str] = ()) -> Path:
        """A path with `~` filled in, or that of the files that an address means, which are fetched.

        Args:
            path: path or address of a file or folder.
            endings: of files that are read of a folder, in small letters with the dot; none: all.

        Raises:
            ValueError: if it does not exist or cannot be fetched.
        """
        if is_address(path):
            self._fetched = fetch(path, endings)
            found = self._fetched.path
            self.provenance = Provenance(origin=origin_of(found), revision=revision_of(found))
            return found
        expanded = Path(path).expanduser()
        if not expanded.exists():
            raise ValueError(f"{type(self).__name__}: {expanded} does not exist")
        return expanded

    def _picture_folder(self, given: str | None, texts: Callable[[], Iterable[str]]) -> Path:
        """The folder that paths of pictures are relative to: the given one, or that of the file that is read.

        Of a folder of the network, the files that the records name are fetched.

        Args:
            given: path or address of the folder; None: where the file lies.
            texts: gives all texts of the records, names of pictures among them.

        Raises:
            ValueError: if they cannot be fetched.
        """
        if given is None and self._fetched is not None and any(True for _ in texts()):
            given = self._fetched.folder if not self._fetched.folder.startswith("http") else None
        if given is None:
            path = Path(self.path or "")
            return path if path.is_dir() else path.parent
        if is_address(given):
            return fetch(given, named=texts, whole=True).path
        return Path(given).expanduser()

    def _revised(self, content: str) -> str:
        """A hash of the content, which of fetched files depends on their revision, too."""
        places = (self.path, getattr(self, "image_folder", None))
        revisions = [found for place in places if place is not None and (found := revision_of(place)) is not None]
        return content if not revisions else hashlib.sha256(f"{content} {revisions}".encode()).hexdigest()[:16]


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


CONTENT = ("captions",)
"""Attributes of sources that tell of their content, and are no settings."""


def describe(thing: Any) -> str:
    """Class and plain settings of an object, as a string that is the same for the same settings.

    A path of fetched files is written as their address with its revision, which is the same on every machine. A class
    of the kit that has moved is written with its first path: caches and checkpoints are found by this string.
    """
    plain = (str, int, float, bool, tuple, list, dict, Path, type(None), Source)
    settings = {
        key: describe(value) if isinstance(value, Source) else _plain(value)
        for key, value in vars(thing).items()
        if not key.startswith("_") and key not in CONTENT and isinstance(value, plain)
    }
    kind = f"{old_name(type(thing).__module__)}.{type(thing).__qualname__}"
    return f"{kind} {json.dumps(settings, sort_keys=True, default=str)}"


def _plain(value: Any) -> Any:
    found = origin_of(value) if isinstance(value, str | Path) else None
    return value if found is None else found


def name_of(path: str) -> str:
    """The default name of a source that reads this path: its last part without the ending, also for `.` and `..`."""
    given = Path(path)
    return given.stem if given.stem.strip(".") else Path(os.path.abspath(given)).stem or "data"


class Lines:
    """A sequence of byte strings in one buffer: a list of Python objects would be copied into every loader worker."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        chunks = list(lines)
        self._buffer = np.frombuffer(b"".join(chunks), dtype=np.uint8)
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._buffer[start : self._ends[index]].tobytes()

    def fingerprint(self) -> str:
        """SHA-256 of all content."""
        return hashlib.sha256(self._buffer.data).hexdigest()[:16]


class FileLines:
    """The lines of files, left on disk: only the offsets of lines are kept in memory. Blank lines are left out."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        spans = [_line_spans(file) for file in self.files]
        self._spans = np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)
        self._ends = np.cumsum([len(span) for span in spans])
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> bytes:
        which = int(np.searchsorted(self._ends, index, side="right"))
        if which not in self._open:
            self._open[which] = np.memmap(self.files[which], np.uint8, "r")
        start, end = self._spans[index]
        return self._open[which][start:end].tobytes()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def fingerprint(self) -> str:
        """SHA-256 of all files."""
        return hash_files(self.files)


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 of the contents of files, one after the other; a file that has not changed is read once by a process."""
    digest = hashlib.sha256()
    for file in files:
        facts = file.stat()
        digest.update(_content_hash(os.path.abspath(file), facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return digest.hexdigest()[:16]


@lru_cache(maxsize=4096)
def _content_hash(file: str, size: int, changed: int, node: int) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _line_spans(file: Path, block: int = 1 << 24) -> NDArray[np.int64]:
    """Offsets (start, end) in bytes of each line that is not blank: `[n, 2]`."""
    size = file.stat().st_size
    if not size:
        return np.zeros((0, 2), np.int64)
    content = np.memmap(file, np.uint8, "r")
    found = [np.flatnonzero(content[at : at + block] == 10) + at for at in range(0, size, block)]
    ends = np.concatenate([*found, [size]])
    spans = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], axis=1)
    # A line of at most two characters may be blank or a bare line break of Windows; longer ones are not looked at.
    short = np.flatnonzero(spans[:, 1] - spans[:, 0] <= 2)
    blank = [i for i in short if not content[spans[i, 0] : spans[i, 1]].tobytes().strip()]
    return np.delete(spans, blank, axis=0)


class JsonLines(Source):
    """A source whose samples are the lines of one .jsonl file, or of all in a folder, or the entries of a JSON list.

    Attributes:
        path: the file or folder.
        allow_links: whether files of pictures may be links that leave the image folder.
        ignore_keys: keys of rows, and of objects in them, that are left out.

    Raises:
        ValueError: for a path that does not exist or holds no such file; and as `read_rows`.
    """

    path: Path

    def __init__(
        self,
        path: str,
        image_folder: str | None,
        name: str | None,
        allow_links: bool = False,
        ignore_keys: Sequence[str] | None = None,
    ) -> None:
        self.path = self._existing(path, [".jsonl"])
        self.allow_links, self.ignore_keys = allow_links, list(ignore_keys or ())
        self._call(name)
        self._lines = read_rows(self.path, allow_links)
        self.image_folder = self._picture_folder(image_folder or None, self._texts)

    def __len__(self) -> int:
        return len(self._lines)

    def fingerprint(self) -> str:
        """SHA-256 of the annotations, and of the revision of fetched ones, 16 hex digits."""
        return self._revised(self._lines.fingerprint())

    def _texts(self) -> Iterator[str]:
        for index in range(len(self._lines)):
            try:
                yield from texts_in(self.json(index))
            except RecordError:
                continue  # `record` refuses this one as malformed; the source stays usable

    def json(self, index: int) -> Any:
        """The value of one line or entry, without `ignore_keys`.

        Raises:
            RecordError: `malformed` if it is not JSON.
        """
        row = parse_json(self._lines[index], f"{self.path} entry {index}")
        return without_keys(row, self.ignore_keys) if self.ignore_keys else row


def read_rows(path: Path, links: bool) -> Lines | FileLines:
    """The rows of a .jsonl file, of all .jsonl files in a folder, or of a .json file: a list, or one row per line.

    Args:
        path: file or folder.
        links: whether folders that are reached by links are read, too.

    Raises:
        ValueError: for a folder without .jsonl files, or a .json file that holds something else; names it.
    """
    if path.is_dir() or path.suffix.lower() != ".json":
        return FileLines(list_files(path, [".jsonl"], links))
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        lines = FileLines([path])
        if len(lines) > 1 and isinstance(_or_none(lines[0]), dict):
            return lines
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a {type(entries).__name__}; expected a list of samples, or one per line")
    return Lines(json.dumps(entry).encode() for entry in entries)


def _or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def parse_json(content: bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        content: UTF-8 text.
        where: names the place in errors.

    Raises:
        RecordError: `malformed` for text that is not JSON, or is nested deeper than Python can read.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecordError("malformed", f"{where} is not JSON: {error}") from error
