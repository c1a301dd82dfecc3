"""Documents: images between sentences (MMC4), and text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_vlm.data.records import Image, Message, Part, Record, RecordError, Text
from lit_vlm.data.sources.base import JsonLines, decode_base64


class Mmc4(JsonLines):
    """MMC4's form: one document per line, with `text_list` and `image_info`.

    An image stands before the sentence that `matched_text_index` names. It is a file `image_name` of the image folder,
    or `image_base64` in the record. Sentences are joined by a space.

    Args:
        path: the .jsonl file, or a folder of them.
        image_folder: where the images are; default: the folder of the file.
        name: name of the source; default: that of the file.
    """

    def __init__(self, path: str, image_folder: str | None = None, name: str | None = None) -> None:
        super().__init__(path, image_folder, name)

    def record(self, index: int) -> Record:
        """One document."""
        raw = self.json(index)
        sentences, infos = (raw.get("text_list"), raw.get("image_info")) if isinstance(raw, dict) else (None, None)
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise RecordError("malformed", f"line {index} has no list of strings 'text_list'")
        if not isinstance(infos, list):
            raise RecordError("malformed", f"line {index} has no list 'image_info'")
        images: dict[int, list[Image]] = {}
        for number, info in enumerate(infos):
            place, image = _mmc4_image(info, f"image_info[{number}]", len(sentences))
            images.setdefault(place, []).append(image)
        parts: list[Part] = []
        for number, sentence in enumerate(sentences):
            if number and number not in images:
                parts.append(Text(" "))
            parts += images.get(number, [])
            parts.append(Text(sentence))
        return Record(f"{self.name}-{index}", self.name, (Message("document", _merged(parts)),))


def _mmc4_image(info: Any, where: str, num_sentences: int) -> tuple[int, Image]:
    place = info.get("matched_text_index") if isinstance(info, dict) else None
    if not isinstance(place, int) or not 0 <= place < num_sentences:
        raise RecordError("malformed", f"{where}.matched_text_index is {place!r}; there are {num_sentences} sentences")
    if isinstance(encoded := info.get("image_base64"), str):
        return place, Image(data=decode_base64(encoded, where))
    if isinstance(path := info.get("image_name"), str) and path:
        return place, Image(path=path)
    raise RecordError("malformed", f"{where} has neither 'image_name' nor 'image_base64'")


def _merged(parts: list[Part]) -> tuple[Part, ...]:
    """Neighbouring texts joined, empty ones left out."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and merged and isinstance(merged[-1], Text):
            merged[-1] = Text(merged[-1].text + part.text)
        elif isinstance(part, Image) or part.text:
            merged.append(part)
    return tuple(merged)


class Texts(JsonLines):
    """Text without images: a question and its answer (`inputs` and `targets`, as FLAN has them) or a document (`text`).

    A .txt file holds one document per line.

    Args:
        path: the .jsonl or .txt file, or a folder of .jsonl files.
        name: name of the source; default: that of the file.
    """

    def __init__(self, path: str, name: str | None = None) -> None:
        self.plain = Path(path).suffix.lower() == ".txt"
        super().__init__(path, None, name)

    def record(self, index: int) -> Record:
        """One question with its answer, or one document."""
        identity = f"{self.name}-{index}"
        if self.plain:
            try:
                text = self._lines[index].decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise RecordError("malformed", f"{self.path} line {index} is not UTF-8: {error}") from error
            return Record(identity, self.name, (Message("document", (Text(text),)),))
        raw = self.json(index)
        if isinstance(raw, dict) and isinstance(raw.get("id"), str | int):
            identity = str(raw["id"])
        if isinstance(raw, dict) and isinstance(raw.get("text"), str):
            return Record(identity, self.name, (Message("document", (Text(raw["text"]),)),))
        if isinstance(raw, dict) and isinstance(raw.get("inputs"), str) and isinstance(raw.get("targets"), str):
            question, answer = Message("user", (Text(raw["inputs"]),)), Message("assistant", (Text(raw["targets"]),))
            return Record(identity, self.name, (question, answer))
        raise RecordError("malformed", f"line {index} has neither 'text' nor 'inputs' and 'targets'")
