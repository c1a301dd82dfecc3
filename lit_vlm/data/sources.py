"""Sources: files of samples, read as canonical records."""

from __future__ import annotations

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_vlm.data.records import Image, Message, Record, RecordError, Role, Text, parse_record

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MARK = "<image>"


LLAVA_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Source(ABC):
    """A list of records.

    Attributes:
        name: what samples, counts and losses are reported under.
        image_folder: what image paths are relative to.
    """

    name: str
    image_folder: Path

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples, bad ones included."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """One record; raises `RecordError` if it is malformed."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content, kept with the run."""


class Lines:
    """Many byte strings in one buffer: a list of Python objects would be copied into every loader worker."""

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


class _LineSource(Source):
    """A source whose samples are byte strings of one file."""

    def __init__(self, path: str, image_folder: str | None, name: str | None) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise ValueError(f"{type(self).__name__}: {self.path} does not exist")
        self.image_folder = Path(image_folder).expanduser() if image_folder else self.path.parent
        self.name = name or self.path.stem
        self._lines = Lines(self._read())

    @abstractmethod
    def _read(self) -> Iterable[bytes]: ...

    def __len__(self) -> int:
        return len(self._lines)

    def fingerprint(self) -> str:
        """SHA-256 of the annotations."""
        return self._lines.fingerprint()

    def _json(self, index: int) -> Any:
        try:
            return json.loads(self._lines[index])
        except ValueError as error:
            raise RecordError("malformed", f"{self.path} entry {index} is not JSON: {error}") from error


class ChatJsonl(_LineSource):
    """One record per line in the chat form of Hugging Face: `messages` of `role` and `content`.

    Args:
        path: the .jsonl file.
        image_folder: what image paths are relative to; default: the folder of the file.
        name: name of the source; default: that of the file.
    """

    def __init__(self, path: str, image_folder: str | None = None, name: str | None = None) -> None:
        super().__init__(path, image_folder, name)

    def _read(self) -> Iterable[bytes]:
        return [line for line in self.path.read_bytes().splitlines() if line.strip()]

    def record(self, index: int) -> Record:
        """The record of one line."""
        return parse_record(self._json(index), self.name, str(index))


class LlavaJson(_LineSource):
    """LLaVA's form: a JSON list of `{id, image, conversations: [{from: human|gpt, value}]}`, `<image>` in the text.

    `image` is a path or a list of paths, used in the order of the marks.

    Args:
        path: the .json file.
        image_folder: what image paths are relative to; default: the folder of the file.
        image_position: `front` moves a turn's image before its text, followed by a newline, as LLaVA-1.5 does;
            `in_place` leaves images where their marks stand.
        name: name of the source; default: that of the file.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        image_position: Literal["front", "in_place"] = "front",
        name: str | None = None,
    ) -> None:
        self.image_position = image_position
        super().__init__(path, image_folder, name)

    def _read(self) -> Iterable[bytes]:
        try:
            entries = json.loads(self.path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{self.path} holds a {type(entries).__name__}; LLaVA's form is a list of samples")
        return [json.dumps(entry).encode() for entry in entries]

    def record(self, index: int) -> Record:
        """The record of one entry."""
        raw = self._json(index)
        if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list) or not raw["conversations"]:
            raise RecordError("malformed", f"entry {index} has no list 'conversations'")
        images = raw.get("image") or []
        paths = [images] if isinstance(images, str) else images
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise RecordError("malformed", f"'image' is {str(images)[:80]!r}; expected a path or a list of paths")
        marks = sum(str(turn.get("value", "")).count(MARK) for turn in raw["conversations"] if isinstance(turn, dict))
        if marks != len(paths):
            raise RecordError("image_count", f"{marks} {MARK} marks in the text, {len(paths)} images in 'image'")
        remaining = iter(paths)
        messages = tuple(self._message(turn, i, remaining) for i, turn in enumerate(raw["conversations"]))
        return Record(str(raw.get("id", index)), self.name, messages)

    def _message(self, turn: Any, index: int, paths: Any) -> Message:
        found = turn.get("from") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or not isinstance(found, str) or found not in LLAVA_ROLES:
            raise RecordError(
                "unknown_role", f"conversations[{index}].from is {found!r}; known: {', '.join(LLAVA_ROLES)}"
            )
        if not isinstance(turn.get("value"), str):
            raise RecordError("malformed", f"conversations[{index}].value is not a string")
        pieces = turn["value"].split(MARK)
        images = [Image(path=str(next(paths))) for _ in pieces[1:]]
        content: list[Text | Image] = []
        if images and self.image_position == "front":
            text = "".join(pieces).strip()
            content = [*images, *([Text(f"\n{text}")] if text else [])]
        else:
            for piece, image in zip(pieces, [*images, None], strict=True):
                content += [Text(piece)] if piece else []
                content += [image] if image else []
        return Message(LLAVA_ROLES[found], tuple(content))


class Captions(Source):
    """Images with captions: a CSV file with columns for both, or a folder with `NAME.txt` beside `NAME.jpg`.

    Args:
        path: a .csv or .tsv file, or a folder.
        prompt: the question that each caption answers; the template `plain` leaves it out.
        image_folder: what image paths of a CSV file are relative to; default: its folder.
        image_column: the CSV column with paths.
        caption_column: the CSV column with captions.
        name: name of the source; default: that of the file or folder.
    """

    def __init__(
        self,
        path: str,
        prompt: str = "Describe the image.",
        image_folder: str | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        name: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise ValueError(f"Captions: {self.path} does not exist")
        self.prompt = prompt
        self.name = name or self.path.stem
        if self.path.is_dir():
            self.image_folder = self.path
            pairs = self._read_folder()
        else:
            self.image_folder = Path(image_folder).expanduser() if image_folder else self.path.parent
            pairs = self._read_csv(image_column, caption_column)
        self._lines = Lines(json.dumps(pair).encode() for pair in pairs)

    def _read_folder(self) -> list[tuple[str, str | None]]:
        images = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise ValueError(f"Captions: there is no image in {self.path}; known: {', '.join(IMAGE_SUFFIXES)}")
        pairs = []
        for image in images:
            text = image.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8").strip() if text.is_file() else None
            pairs.append((str(image.relative_to(self.path)), caption))
        return pairs

    def _read_csv(self, image_column: str, caption_column: str) -> list[tuple[str, str | None]]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            tabs = self.path.suffix == ".tsv"  # quotes mean nothing there
            rows = csv.DictReader(
                file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
            )
            for column in (image_column, caption_column):
                if column not in (rows.fieldnames or ()):
                    raise ValueError(f"Captions: {self.path} has no column '{column}', only {rows.fieldnames}")
            return [(row[image_column], row[caption_column]) for row in rows]

    def __len__(self) -> int:
        return len(self._lines)

    def record(self, index: int) -> Record:
        """A question with the image, and the caption as its answer."""
        image, caption = json.loads(self._lines[index])
        if not caption:
            raise RecordError("malformed", f"{image} has no caption")
        question = Message("user", (Image(path=image), Text(f"\n{self.prompt}")))
        return Record(image, self.name, (question, Message("assistant", (Text(caption),))))

    def fingerprint(self) -> str:
        """SHA-256 of paths and captions."""
        return self._lines.fingerprint()
