"""Parquet tables with images inside, as Hugging Face's data sets have them."""

from __future__ import annotations

import string
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import pyarrow.parquet as pq

from lit_vlm.data.records import Image, Message, Record, RecordError, Text, parse_record
from lit_vlm.data.sources.base import MARK, Source, hash_files, list_files
from lit_vlm.data.sources.conversations import llava_record


class Parquet(Source):
    """Rows with an `image` (bytes, or `{bytes, path}`) or a list `images`, and one of these:

    - `messages` (chat form; `<image>` marks or image parts take the images in order),
    - `conversations` (LLaVA's form),
    - `question` and `answer`, with `choices` if it is a multiple choice, as CV-Bench has them: an answer such as `(B)`
      then means the second choice,
    - `caption` or `text`.

    Args:
        path: a .parquet file, or a folder of them.
        prompt: the question that each caption answers; the template `plain` leaves it out.
        name: name of the source; default: that of the file or folder.
    """  # noqa: D415

    def __init__(self, path: str, prompt: str = "Describe the image.", name: str | None = None) -> None:
        self.path = self._existing(path)
        self.prompt = prompt
        self.name = name or self.path.stem
        self.image_folder = self.path if self.path.is_dir() else self.path.parent
        self.files = list_files(self.path, [".parquet"])
        self._groups: list[tuple[int, int]] = []  # file and row group
        rows = []
        for number, file in enumerate(self.files):
            try:
                meta = pq.read_metadata(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} is no parquet file: {error}") from error
            for group in range(meta.num_row_groups):
                self._groups.append((number, group))
                rows.append(meta.row_group(group).num_rows)
        self._ends = list(accumulate(rows))
        self._loaded: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> Record:
        """One row; a group of rows is read at a time, so reading in order is much faster than jumping about."""
        try:
            row = self._row(index)
        except (OSError, ValueError) as error:
            raise RecordError("malformed", f"row {index} cannot be read: {error}") from error
        images = _images(row)
        identity = next((str(row[key]) for key in ("id", "idx", "question_id") if row.get(key) is not None), str(index))
        if row.get("messages"):
            return _chat(row, self.name, identity, images)
        if row.get("conversations"):
            return llava_record({**row, "id": identity}, self.name, index, images, "in_place")
        if isinstance(row.get("question"), str):
            return _question(row, self.name, identity, images)
        caption = next((row[key] for key in ("caption", "text") if isinstance(row.get(key), str)), None)
        if not caption:
            raise RecordError(
                "malformed",
                f"row {index} has none of messages, conversations, question, caption, text; columns: {sorted(row)}",
            )
        if not images and row.get("caption"):
            raise RecordError("missing_image", f"row {index} has a caption and no image")
        if not images:
            return Record(identity, self.name, (Message("document", (Text(caption),)),))
        question = Message("user", (*images, Text(f"\n{self.prompt}")))
        return Record(identity, self.name, (question, Message("assistant", (Text(caption),))))

    def fingerprint(self) -> str:
        """SHA-256 of all files."""
        return hash_files(self.files)

    def _row(self, index: int) -> dict[str, Any]:
        which = bisect_right(self._ends, index)
        if self._loaded is None or self._loaded[0] != which:
            number, group = self._groups[which]
            self._loaded = (which, pq.ParquetFile(self.files[number]).read_row_group(group))
        local = index - (self._ends[which - 1] if which else 0)
        return self._loaded[1].slice(local, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}


def _images(row: dict[str, Any]) -> list[Image]:
    found = row.get("images") or row.get("image")
    values = found if isinstance(found, list) else [] if found is None else [found]
    return [_image(value, number) for number, value in enumerate(values)]


def _image(value: Any, number: int) -> Image:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Image(data=value)
    if isinstance(value, str) and value:
        return Image(path=value)
    raise RecordError("malformed", f"image {number} is {type(value).__name__}; expected bytes, or {{bytes, path}}")


def _chat(row: dict[str, Any], source: str, identity: str, images: list[Image]) -> Record:
    """Chat form whose marks or image parts stand for the images of the row."""
    if not isinstance(row["messages"], list):
        raise RecordError("malformed", f"'messages' is a {type(row['messages']).__name__}; expected a list")
    turns = [_marks_to_parts(turn) for turn in row["messages"]]
    # Parquet fills every part with every key, so parts that name no image file are told apart by their type.
    parts = [part for turn in turns for part in turn["content"] if part.get("type") == "image"]
    if len(parts) != len(images):
        raise RecordError("image_count", f"{len(parts)} image parts or marks, {len(images)} images in the row")
    for number, part in enumerate(parts):
        part["image"] = str(number)
    record = parse_record({"id": identity, "messages": turns, "options": row.get("options") or []}, source, identity)
    messages = tuple(
        Message(m.role, tuple(images[int(str(p.path))] if isinstance(p, Image) else p for p in m.content))
        for m in record.messages
    )
    return Record(record.id, source, messages, record.options)


def _marks_to_parts(turn: Any) -> dict[str, Any]:
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, list):
        parts = [
            {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
            for part in content
        ]
        if all(isinstance(part, dict) for part in parts):
            return {"role": turn.get("role"), "content": parts}
    if not isinstance(content, str):
        raise RecordError("malformed", "'messages' is a list of {role, content}")
    parts = []
    for number, piece in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return {"role": turn.get("role"), "content": parts}


def _question(row: dict[str, Any], source: str, identity: str, images: list[Image]) -> Record:
    answer, choices = row.get("answer"), row.get("choices") or []
    if not isinstance(answer, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise RecordError("malformed", f"'answer' is {answer!r} and 'choices' {choices!r}; expected text and texts")
    letter = answer.strip().strip("().").upper()
    if choices and answer not in choices:
        if letter not in string.ascii_uppercase[: len(choices)] or len(letter) != 1:
            raise RecordError("malformed", f"answer {answer!r} is none of the {len(choices)} choices, nor their letter")
        answer = choices[string.ascii_uppercase.index(letter)]
    messages = (
        Message("user", (*images, Text(f"\n{row['question']}" if images else row["question"]))),
        Message("assistant", (Text(answer),)),
    )
    return Record(identity, source, messages, tuple(choices))
