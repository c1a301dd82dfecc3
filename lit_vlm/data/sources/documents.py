"""Documents: images between sentences (MMC4), and text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.records import Content, Image, Message, Record, RecordError, Text
from lit_vlm.data.records.media import MARK, decode_base64, image_of, refuse_marks, refuse_unread, urls_of
from lit_vlm.data.sources.base import JsonLines
from lit_vlm.data.sources.conversations import with_system


class Mmc4(JsonLines):
    """MMC4's form: one document per line, with `text_list` and `image_info`.

    An image stands before the sentence that `matched_text_index` names, several images of one sentence in the order of
    `image_info`. It is the file `image_name` of the image folder, or `image_base64` in the record. Sentences are joined
    by a space, but not beside an image; a literal `<image>` in a sentence is written `<IMAGE>`.

    The ablations are those of VILA (section 3.2 and table 3).

    Args:
        path: the .jsonl file, or a folder of them.
        image_folder: where the images are; default: the folder of the file.
        max_images: most images of a document: the first ones of `image_info` (VILA: 6); default: all.
        items: `documents`: one record per document, images in place. `images_first`: the same text with all images in
            front of it. `pairs`: one record for each image, with the sentence it belongs to.
        loss: `all_text` supervises all text (VILA's released code), `after_image` only sentences that directly follow
            an image (VILA's earlier code).
        joint: what stands between sentences; a space is left out beside an image. With `after_image` the reference
            writes Llama's `<unk>`, which it takes out again after tokenising.
        name: name of the source; default: that of the file.
        allow_links: whether image files may be links that leave the image folder.
        ignore_keys: keys that are removed from the rows, and from the objects in them, before they are read: for keys
            that look like a picture, a film or a sound and are none.

    Raises:
        ValueError: for a path that does not exist or holds no such file, and for arguments that do not go together.
    """

    def __init__(
        self,
        path: str,
        image_folder: str | None = None,
        max_images: int | None = None,
        items: Literal["documents", "images_first", "pairs"] = "documents",
        loss: Literal["all_text", "after_image"] = "all_text",
        joint: str = " ",
        name: str | None = None,
        allow_links: bool = False,
        ignore_keys: list[str] | None = None,
    ) -> None:
        super().__init__(path, image_folder, name, allow_links, ignore_keys)
        self._prefix = self.name  # ids stay as they are when a source is renamed
        if max_images is not None and max_images < 1:
            raise ValueError(f"Mmc4: max_images is at least 1, not {max_images}")
        if loss == "after_image" and items != "documents":
            raise ValueError(f"Mmc4: loss after_image is for items documents, not for {items}")
        self.max_images, self.items, self.loss, self.joint = max_images, items, loss, joint
        self._pairs = self._find_pairs() if items == "pairs" else None

    def __len__(self) -> int:
        return super().__len__() if self._pairs is None else len(self._pairs)

    def record(self, index: int) -> Record:
        """One document, or with `items: pairs` one image with its sentence.

        Raises:
            RecordError: for a line that is no document of MMC4, or whose pictures cannot be read.
        """
        line, number = (index, None) if self._pairs is None else self._pairs[index].tolist()
        sentences, images, urls = self._read(line)
        identity = f"{self._prefix}-{line}"
        if number is not None:
            if number < 0:
                raise RecordError("malformed", f"line {line} is no document of MMC4")
            place, image = images[number]
            content: tuple[Content, ...] = (image, Text(sentences[place].strip()))
            return Record(f"{identity}-{number}", self.name, (Message("document", content),), urls=urls)
        matched: dict[int, list[Image]] = {}
        for place, image in images:
            matched.setdefault(place, []).append(image)
        matched = dict(sorted(matched.items()))
        parts = self._parts(sentences, matched)
        return Record(identity, self.name, (Message("document", _merged(parts)),), urls=urls)

    def fingerprint(self) -> str:
        """A hash of the files, and of the arguments where they change the records."""
        made = (self.max_images, self.items, self.loss, self.joint)
        plain = (None, "documents", "all_text", " ")
        files = super().fingerprint()
        return files if made == plain else hashlib.sha256(f"{files} {made}".encode()).hexdigest()[:16]

    def _read(self, line: int) -> tuple[list[str], list[tuple[int, Image]], tuple[str, ...]]:
        """The sentences of a line, its kept images with their sentence numbers, and addresses of page and images."""
        raw = self.json(line)
        sentences, infos = (raw.get("text_list"), raw.get("image_info")) if isinstance(raw, dict) else (None, None)
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise RecordError("malformed", f"line {line} has no list of strings 'text_list'")
        if not isinstance(infos, list):
            raise RecordError("malformed", f"line {line} has no list 'image_info'")
        refuse_unread(raw, (), bool(infos), f"line {line}", "MMC4 names pictures in 'image_info'")
        kept = infos[: self.max_images]
        images = [
            _mmc4_image(info, f"image_info[{number}]", len(sentences), self.allow_links)
            for number, info in enumerate(kept)
        ]
        urls = (*urls_of(raw), *(url for info in kept for url in urls_of(info, ("raw_url",))))
        return [sentence.replace(MARK, "<IMAGE>") for sentence in sentences], images, urls

    def _parts(self, sentences: list[str], matched: dict[int, list[Image]]) -> list[Content]:
        supervised_all, space = self.loss == "all_text", self.joint.isspace()
        in_place = {} if self.items == "images_first" else matched
        parts: list[Content] = [] if in_place else [image for images in matched.values() for image in images]
        for number, sentence in enumerate(sentences):
            if number and not (space and number in in_place):
                parts.append(Text(self.joint, loss=None if supervised_all else False))
            parts += in_place.get(number, [])
            text = sentence.lstrip(" ") if number in in_place else sentence
            text = text.rstrip(" ") if number + 1 in in_place else text
            parts.append(Text(text, loss=None if supervised_all else number in matched))
        return parts

    def _find_pairs(self) -> NDArray[np.int64]:
        """Numbers of line and image of each pair, `[n, 2]`; a line that cannot be read is one pair of image -1."""
        found: list[tuple[int, int]] = []
        for line in range(super().__len__()):
            try:
                raw = self.json(line)
                infos = raw.get("image_info") if isinstance(raw, dict) else None
                count = len(infos[: self.max_images]) if isinstance(infos, list) else -1
            except RecordError:
                count = -1
            found += [(line, number) for number in range(count)] if count >= 0 else [(line, -1)]
        return np.array(found, np.int64).reshape(-1, 2)


def _mmc4_image(info: Any, where: str, num_sentences: int, links: bool) -> tuple[int, Image]:
    place = info.get("matched_text_index") if isinstance(info, dict) else None
    if not isinstance(place, int) or not 0 <= place < num_sentences:
        raise RecordError("malformed", f"{where}.matched_text_index is {place!r}; there are {num_sentences} sentences")
    if isinstance(encoded := info.get("image_base64"), str) and encoded:
        return place, Image(data=decode_base64(encoded, where))
    if isinstance(path := info.get("image_name"), str) and path:
        return place, image_of(path, f"{where}.image_name", links)
    raise RecordError("malformed", f"{where} has neither 'image_name' nor 'image_base64'")


def _merged(parts: list[Content]) -> tuple[Content, ...]:
    """Join neighbouring texts of the same supervision, and leave empty ones out."""
    merged: list[Content] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, Text) and isinstance(last, Text) and last.loss == part.loss:
            merged[-1] = Text(last.text + part.text, part.loss)
        elif isinstance(part, Image) or part.text:
            merged.append(part)
    return tuple(merged)


class Texts(JsonLines):
    """Text without images: a question and its answer (`inputs` and `targets`, as FLAN has them) or a document (`text`).

    A .txt file holds one document per line. A row that names a picture, film or sound, or whose text holds the mark
    `<image>`, is refused, as its text would be trained without the picture.

    Args:
        path: the .jsonl, .json or .txt file, or a folder of .jsonl files.
        system: system text of questions; "" for none at all; default: the template's.
        name: name of the source; default: that of the file.
        ignore_keys: keys that are removed from the rows, and from the objects in them, before they are read: for keys
            that look like a picture, a film or a sound and are none.

    Raises:
        ValueError: for a path that does not exist or holds no such file.
    """

    def __init__(
        self, path: str, system: str | None = None, name: str | None = None, ignore_keys: list[str] | None = None
    ) -> None:
        self.system = system
        self.plain = Path(path).suffix.lower() == ".txt"
        super().__init__(path, None, name, ignore_keys=ignore_keys)
        self._prefix = self.name  # ids stay as they are when a source is renamed

    def record(self, index: int) -> Record:
        """One question with its answer, or one document.

        Raises:
            RecordError: for a row without text, or with a picture, film or sound.
        """
        return refuse_marks(self._read(index))

    def _texts(self) -> Iterator[str]:
        return iter(())  # no text names a picture that would be read

    def _read(self, index: int) -> Record:
        identity = f"{self._prefix}-{index}"
        if self.plain:
            try:
                text = self._lines[index].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise RecordError("malformed", f"{self.path} line {index} is not UTF-8: {error}") from error
            return Record(identity, self.name, (Message("document", (Text(text),)),))
        raw = self.json(index)
        if isinstance(raw, dict) and isinstance(raw.get("id"), str | int):
            identity = str(raw["id"])
        if isinstance(raw, dict):
            refuse_unread(
                raw, (), False, f"line {index}", "Texts reads text alone; pictures with captions are for Captions"
            )
        asks = isinstance(raw, dict) and isinstance(raw.get("inputs"), str) and isinstance(raw.get("targets"), str)
        if isinstance(raw, dict) and isinstance(raw.get("text"), str) and (raw["text"] or not asks):
            return Record(identity, self.name, (Message("document", (Text(raw["text"]),)),), urls=urls_of(raw))
        if asks:
            question, answer = Message("user", (Text(raw["inputs"]),)), Message("assistant", (Text(raw["targets"]),))
            return with_system(Record(identity, self.name, (question, answer), urls=urls_of(raw)), self.system)
        raise RecordError("malformed", f"line {index} has neither 'text' nor 'inputs' and 'targets'")
