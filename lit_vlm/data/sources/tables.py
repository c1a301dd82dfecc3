"""Parquet tables with images inside, as Hugging Face's data sets have them."""

from __future__ import annotations

import string
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from lit_vlm.data.records import Content, Image, Message, Record, RecordError, Text
from lit_vlm.data.records.files import list_files
from lit_vlm.data.records.media import (
    IMAGE_KEYS,
    IMAGE_SUFFIXES,
    MARK,
    is_nothing,
    refuse_marks,
    refuse_unread,
    row_images,
    urls_of,
    without_keys,
)
from lit_vlm.data.records.parsing import is_chat, parse_record
from lit_vlm.data.remote import fetch, is_address, origin_of
from lit_vlm.data.sources.base import Source, hash_files
from lit_vlm.data.sources.conversations import interleave, llava_record


class Parquet(Source):
    """Rows with an `image` (bytes, or `{bytes, path}`) or a list `images`, and one of these:

    - `messages`, `texts` (the_cauldron, FineVision) or `query` and `response`, as `ChatJsonl` reads them: `<image>`
      marks or image parts take the images in order,
    - `conversations` (LLaVA's form),
    - `question` and `answer`, with `choices` if it is a multiple choice, as CV-Bench has them: an answer such as `(B)`
      then means the second choice,
    - `caption` or `text`.

    Args:
        path: a .parquet file, or a folder of them.
        prompt: the question that each caption answers; the template `plain` leaves it out.
        name: name of the source; default: that of the file or folder.
        image_folder: what image paths are relative to, where a table has paths; default: its folder.
        allow_links: whether image files may be links that leave the image folder.
        ignore_keys: keys that are removed from the rows, and from the turns and parts in them, before they are read:
            for keys that look like a picture, a film or a sound and are none.

    Raises:
        ValueError: for a path that does not exist or holds no parquet file, and for a file that is none.
    """  # noqa: D415

    path: Path

    def __init__(
        self,
        path: str,
        prompt: str = "Describe the image.",
        name: str | None = None,
        image_folder: str | None = None,
        allow_links: bool = False,
        ignore_keys: list[str] | None = None,
    ) -> None:
        import pyarrow.parquet as pq  # takes 0.3 s to import, and few processes read tables

        self.path = self._existing(path, [".parquet"])
        self.prompt, self.allow_links, self.ignore_keys = prompt, allow_links, list(ignore_keys or ())
        self._call(name)
        self.image_folder = self._folder(image_folder or None)
        self.files = list_files(self.path, [".parquet"], allow_links)
        self._groups: list[tuple[int, int]] = []  # file and row group
        rows = []
        for number, file in enumerate(self.files):
            try:
                meta = pq.read_metadata(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"{origin_of(file) or file} is no parquet file, or not all of it: {error}") from error
            for group in range(meta.num_row_groups):
                self._groups.append((number, group))
                rows.append(meta.row_group(group).num_rows)
        self._ends = list(accumulate(rows))
        self._loaded: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> Record:
        """The record of one row; a row group is read at a time, so reading in order is much faster than jumping about.

        Raises:
            RecordError: for a row that cannot be read, or holds none of the forms above.
        """
        try:
            row = self._row(index)
        except (OSError, ValueError) as error:
            raise RecordError("malformed", f"row {index} cannot be read: {error}") from error
        identity = next((str(row[key]) for key in ("id", "idx", "question_id") if row.get(key) is not None), str(index))
        if is_chat(row):
            return parse_record({**row, "id": identity}, self.name, identity, self.allow_links)
        images = row_images(row, self.allow_links)
        if not is_nothing(row.get("conversations")):
            return llava_record({**row, "id": identity}, self.name, index, images, "in_place")
        refuse_unread(row, IMAGE_KEYS, bool(images), f"row {index}", "pictures stand under 'image' or 'images'")
        if isinstance(row.get("question"), str) and not all(is_nothing(row.get(key)) for key in ("question", "answer")):
            return refuse_marks(_question(row, self.name, identity, images))
        return refuse_marks(self._caption(row, index, identity, images))

    def _caption(self, row: dict[str, Any], index: int, identity: str, images: list[Image]) -> Record:
        caption = next((row[key] for key in ("caption", "text") if row.get(key) and isinstance(row[key], str)), None)
        if caption is None:
            raise RecordError(
                "malformed",
                f"row {index} has none of messages, texts, query, conversations, question, caption, text; columns: "
                f"{sorted(row)}",
            )
        if not images and row.get("caption"):
            raise RecordError("missing_image", f"row {index} has a caption and no image")
        if not images:
            return Record(identity, self.name, (Message("document", (Text(caption),)),), urls=urls_of(row))
        question = Message("user", (*images, Text(f"\n{self.prompt}")))
        answer = Message("assistant", (Text(caption),))
        return Record(identity, self.name, (question, answer), urls=urls_of(row))

    def fingerprint(self) -> str:
        """SHA-256 of all files, and of the revision of fetched ones."""
        return self._revised(hash_files(self.files))

    def _folder(self, given: str | None) -> Path:
        """The folder of pictures; of one of the network all are fetched, as tables are not read for their names."""
        if given is not None and is_address(given):
            return fetch(given, IMAGE_SUFFIXES, whole=True).path
        if given is not None:
            return Path(given).expanduser()
        return self.path if self.path.is_dir() else self.path.parent

    def _row(self, index: int) -> dict[str, Any]:
        import pyarrow.parquet as pq

        which = bisect_right(self._ends, index)
        if self._loaded is None or self._loaded[0] != which:
            number, group = self._groups[which]
            self._loaded = (which, pq.ParquetFile(self.files[number]).read_row_group(group))
        local = index - (self._ends[which - 1] if which else 0)
        row = self._loaded[1].slice(local, 1).to_pylist()[0]
        return without_keys(row, self.ignore_keys) if self.ignore_keys else row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}


def _question(row: dict[str, Any], source: str, identity: str, images: list[Image]) -> Record:
    answer, choices = row.get("answer"), [] if is_nothing(row.get("choices")) else row["choices"]
    if not isinstance(answer, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise RecordError("malformed", f"'answer' is {answer!r} and 'choices' {choices!r}; expected text and texts")
    letter = answer.strip().strip("().").upper()
    if choices and answer not in choices:
        if letter not in string.ascii_uppercase[: len(choices)] or len(letter) != 1:
            raise RecordError("malformed", f"answer {answer!r} is none of the {len(choices)} choices, nor their letter")
        answer = choices[string.ascii_uppercase.index(letter)]
    messages = (
        Message("user", _with_images(row["question"], images)),
        Message("assistant", (Text(answer),)),
    )
    return Record(identity, source, messages, tuple(choices), urls_of(row))


def _with_images(question: str, images: list[Image]) -> tuple[Content, ...]:
    """A question with its pictures at their marks, or in front; raises `RecordError` if their numbers differ."""
    pieces = question.split(MARK)
    if len(pieces) == 1:
        return (*images, Text(f"\n{question}" if images else question))
    if len(pieces) - 1 != len(images):
        raise RecordError(
            "image_count", f"{len(pieces) - 1} {MARK} marks in the question, {len(images)} images in the row"
        )
    return tuple(interleave(pieces, images))
