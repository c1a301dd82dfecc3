"""Records as the page shows them: as their source has them, and as a model gets them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from torch import Tensor

from lit_vlm.core.batch import IGNORE
from lit_vlm.data.records import Content, Image, Message, RecordError, Text, decode_image, image_bytes
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.view.records import Records

SUPERVISED = ("assistant", "document")
"""Roles whose texts carry a loss where these do not say it themselves; see `Text.loss`."""
PLAIN = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp"}
"""Formats that browsers show: the file is handed on as it is."""


def show_record(records: Records, index: int) -> dict[str, Any]:
    """A record for the page: messages, what is known of it, and what the model gets of it."""
    source, local = records.place(index)
    record, error = records.look(index)
    shown: dict[str, Any] = {
        "index": index,
        "source": source.name,
        "place": local,
        "facts": records.facts(index),
        "problem": None if error is None else {"reason": error.reason, "detail": error.detail},
    }
    if record is None:
        return shown
    number = iter(range(len(record.images)))
    messages = [
        {"role": message.role, "parts": [_part(part, message, number) for part in message.content]}
        for message in record.messages
    ]
    shown |= {"id": record.id, "urls": record.urls, "options": record.options, "messages": messages}
    if records.encode is not None:
        shown["samples"] = _samples(records, records.encode, index)
    return shown


def _part(part: Content, message: Message, number: Iterator[int]) -> dict[str, Any]:
    if isinstance(part, Text):
        supervised = message.role in SUPERVISED if part.loss is None else part.loss
        return {"text": part.text, "supervised": supervised}
    return {"picture": next(number), "name": part.path, "size": part.size, "moment": part.moment}


def _samples(records: Records, encode: SampleEncoder, index: int) -> dict[str, Any]:
    """What the model gets of a record, or why it gets nothing."""
    try:
        samples = records.samples(index, records.record(index))
    except RecordError as error:
        return {"problem": {"reason": error.reason, "detail": error.detail}}
    return {
        "sequences": [
            {
                "positions": len(sample),
                "supervised": sample.num_supervised,
                "note": None if sample.note is None else f"{sample.note.reason}: {sample.note.detail}",
                "pieces": list(pieces_of(sample, encode)),
            }
            for sample in samples
        ]
    }


def pieces_of(sample: Sample, encode: SampleEncoder) -> Iterator[dict[str, Any]]:
    """Yield the texts of a sample, each supervised as a whole or not at all, and its images in their places.

    A text is what its tokens decode to, special tokens included.

    Args:
        sample: the sample.
        encode: what encoded it.
    """
    at = 0
    for number, (start, grid) in enumerate(zip(sample.image_starts, sample.grids, strict=True)):
        yield from _texts(sample, encode, at, start)
        at = start + grid.num_tokens
        yield {"picture": number, "start": start, "tokens": grid.num_tokens, "rows": grid.rows, "cols": grid.cols}
    yield from _texts(sample, encode, at, len(sample))


def _texts(sample: Sample, encode: SampleEncoder, start: int, end: int) -> Iterator[dict[str, Any]]:
    # Nothing precedes the first position, so it has no loss whatever its label.
    places = range(start, end)
    for supervised, run in groupby(places, lambda place: place > 0 and sample.labels[place] != IGNORE):
        own = list(run)
        text = encode.spec.tokenizer.decode(sample.ids[own[0] : own[-1] + 1], clean_up_tokenization_spaces=False)
        yield {"text": str(text), "supervised": supervised, "start": own[0], "tokens": len(own)}


def picture(records: Records, index: int, number: int, side: int | None = None) -> tuple[bytes, str]:
    """The content and the type of a picture of a record.

    Args:
        records: the records.
        index: of the record.
        number: of its picture.
        side: pixels of the longer side of a smaller copy; None gives the whole, its own file where browsers show it.

    Raises:
        RecordError: where record or picture cannot be read.
        IndexError: for a picture that the record does not have.
    """
    image = records.record(index).images[number]
    folder = records.place(index)[0].image_folder
    if side is None and not image.in_video:
        content = image_bytes(image, folder)
        if (kind := _kind(content)) is not None:
            return content, kind
    whole = _small(image, folder, side)
    return _encoded(whole, "PNG" if side is None else "JPEG")


def seen(records: Records, index: int, sequence: int, number: int) -> tuple[bytes, str]:
    """A picture as the encoder gets it, resized, cropped or in tiles: content and type.

    Raises:
        RecordError: where the model gets nothing of the record.
        IndexError: for a sequence or picture that there is not.
    """
    pixels: Tensor = records.samples(index, records.record(index))[sequence].images[number]
    return _encoded(PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), "PNG")


def _kind(content: bytes) -> str | None:
    """The type of a file that browsers show; None for another one, or one that is no picture."""
    try:
        with PILImage.open(io.BytesIO(content), formats=list(PLAIN)) as opened:
            return PLAIN.get(opened.format or "")
    except (OSError, ValueError, SyntaxError):
        return None


def _small(image: Image, folder: Path, side: int | None) -> PILImage.Image:
    if side is None:
        return decode_image(image, folder)[0]
    found = decode_image(image, folder, lambda size: min(1.0, side / max(size)))[0]
    found.thumbnail((side, side))
    return found


def _encoded(found: PILImage.Image, form: str) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    found.save(buffer, form)
    return buffer.getvalue(), PLAIN[form]
