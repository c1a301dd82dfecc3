"""Images with captions, and images alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.records.files import list_files
from lit_vlm.data.records.media import IMAGE_SUFFIXES, image_of, refuse_marks, urls_of
from lit_vlm.data.sources.base import Lines, Source, parse_json, read_rows


class Captions(Source):
    """Images with captions: a table with columns for both, or a folder with `NAME.txt` beside `NAME.jpg`.

    Args:
        path: a .csv, .tsv, .jsonl or .json file, or a folder.
        prompt: the question that each caption answers; the template `plain` leaves it out.
        image_folder: what image paths of a table are relative to; default: its folder.
        image_column: the column, or key, with paths.
        caption_column: the column, or key, with captions.
        name: name of the source; default: that of the file or folder.
        allow_links: whether image files may be links that leave the image folder.

    Raises:
        ValueError: for a path that does not exist, a table without the two columns, or a folder without images.
    """

    path: Path

    def __init__(
        self,
        path: str,
        prompt: str = "Describe the image.",
        image_folder: str | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        name: str | None = None,
        allow_links: bool = False,
    ) -> None:
        self.path = self._existing(path, [*IMAGE_SUFFIXES, ".txt"])
        self.prompt, self.allow_links = prompt, allow_links
        self._call(name)
        if self.path.is_dir():
            self.image_folder = self.path
            pairs = self._read_folder()
        else:
            json_ = self.path.suffix.lower() in (".jsonl", ".json")
            pairs = (self._read_json if json_ else self._read_csv)(image_column, caption_column)
            named = [image for image, *_ in pairs if image]
            self.image_folder = self._picture_folder(image_folder or None, lambda: named)
        self._lines = Lines(json.dumps(pair).encode() for pair in pairs)

    def _read_folder(self) -> list[tuple[str | None, ...]]:
        pairs: list[tuple[str | None, ...]] = []
        for image in list_files(self.path, IMAGE_SUFFIXES, self.allow_links):
            text = image.with_suffix(".txt")
            caption = _read_caption(text) if text.is_file() else None
            pairs.append((str(image.relative_to(self.path)), caption))
        return pairs

    def _read_csv(self, image_column: str, caption_column: str) -> list[tuple[str | None, ...]]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            tabs = self.path.suffix.lower() == ".tsv"  # quotes mean nothing there
            rows = csv.DictReader(
                file,
                delimiter="\t" if tabs else ",",
                quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
                strict=True,
            )
            try:
                for column in (image_column, caption_column):
                    if column not in (rows.fieldnames or ()):
                        raise ValueError(f"Captions: {self.path} has no column '{column}', only {rows.fieldnames}")
                return [(row[image_column], row[caption_column], *urls_of(row)) for row in rows]
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"Captions: {self.path}, line {rows.line_num + 1}: {error}") from error

    def _read_json(self, image_column: str, caption_column: str) -> list[tuple[str | None, ...]]:
        lines = read_rows(self.path, self.allow_links)
        pairs: list[tuple[str | None, ...]] = []
        for number in range(len(lines)):
            try:
                row = parse_json(lines[number], f"line {number}")
            except RecordError:
                row = None  # `record` refuses this one as malformed; the source stays usable
            values = [row.get(column) if isinstance(row, dict) else None for column in (image_column, caption_column)]
            image, caption = (value if isinstance(value, str) else None for value in values)
            pairs.append((image, caption, *urls_of(row)))
        if not any(image and caption for image, caption, *_ in pairs):
            raise ValueError(
                f"Captions: no line of {self.path} has texts under '{image_column}' and '{caption_column}'"
            )
        return pairs

    def __len__(self) -> int:
        return len(self._lines)

    def record(self, index: int) -> Record:
        """A question with the image, and the caption as its answer.

        Raises:
            RecordError: `malformed` where image or caption is missing; and as `image_of` and `refuse_marks`.
        """
        image, caption, *urls = json.loads(self._lines[index])
        if not image or not caption:
            raise RecordError("malformed", f"{image or f'row {index}'} has no {'caption' if image else 'image'}")
        picture = image_of(image, f"the image of row {index}", self.allow_links)
        question = Message("user", (picture, Text(f"\n{self.prompt}")))
        identity = image if picture.path is not None else str(index)
        answer = Message("assistant", (Text(caption),))
        return refuse_marks(Record(identity, self.name, (question, answer), urls=tuple(urls)))

    def fingerprint(self) -> str:
        """SHA-256 of paths and captions, and of the revision of fetched files, 16 hex digits."""
        return self._revised(self._lines.fingerprint())


def _read_caption(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        return None  # `record` refuses this one as malformed; the source stays usable


class Pictures(Source):
    """Images alone, without text: all of a folder, and of the folders in it.

    Args:
        path: the folder.
        name: name of the source; default: that of the folder.
        allow_links: whether image files may be links that leave the folder.

    Raises:
        ValueError: for a path that is no folder, or a folder without images.
    """

    path: Path

    def __init__(self, path: str, name: str | None = None, allow_links: bool = False) -> None:
        self.path = self._existing(path, IMAGE_SUFFIXES)
        if not self.path.is_dir():
            raise ValueError(f"Pictures: {self.path} is no folder")
        self.image_folder = self.path
        self.allow_links = allow_links
        self._call(name)
        files = list_files(self.path, IMAGE_SUFFIXES, allow_links)
        self._lines = Lines(str(file.relative_to(self.path)).encode() for file in files)

    def __len__(self) -> int:
        return len(self._lines)

    def record(self, index: int) -> Record:
        """A document that holds one image."""
        path = self._lines[index].decode()
        return Record(path, self.name, (Message("document", (Image(path=path, links=self.allow_links),)),))

    def fingerprint(self) -> str:
        """SHA-256 of the paths, and of the revision of fetched files."""
        return self._revised(self._lines.fingerprint())
