"""The records of one block of a set, as they are written: items, outlines, and what is counted of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from litdata.streaming.writer import BinaryWriter
from PIL import Image as PILImage
from transformers import AutoTokenizer

from lit_vlm.core.batch import BadSample
from lit_vlm.core.pretrained import resolve
from lit_vlm.data.records import Image, Record, RecordError, Videos, image_bytes, open_image
from lit_vlm.data.sets.scan import id_value
from lit_vlm.data.sets.shards import CHUNK_BYTES
from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.converted import RECORDS, encode_record

MIN_SIDE = 4
"""Shortest side in pixels of an image that can be used, if nothing else is said."""
Encoded = tuple[bytes, tuple[int, int]]
"""Encoded bytes and (width, height) in pixels of an image."""


class BlockWriter:
    """Writes the records of one block into a folder of its own.

    Args:
        folder: an empty folder.
        source: the source of the records.
        tokenizer: source of the tokenizer that tokens are counted with; None counts none.
        shard_bytes: size of shards, to a record; the last one is smaller.
    """

    def __init__(
        self, folder: Path, source: Source, tokenizer: str | None = None, shard_bytes: int = CHUNK_BYTES
    ) -> None:
        self.source = source
        self._items = BinaryWriter(str(folder), chunk_bytes=shard_bytes)
        self._outlines = BinaryWriter(str(folder / RECORDS), chunk_bytes=shard_bytes)
        self._tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer, weights=False)) if tokenizer else None
        self._digest = hashlib.sha256()
        self._facts: dict[str, Any] = {
            "records": 0, "images": 0, "image_bytes": 0, "bytes": 0, "words": [], "tokens": [], "ids": []
        }  # fmt: skip

    def add(self, record: Record, images: Sequence[Encoded]) -> None:
        """Write a record.

        Args:
            record: the record.
            images: each of its images, in order.
        """
        facts, item = self._facts, encode_record(record, images)
        self._items.add_item(facts["records"], item)
        self._outlines.add_item(facts["records"], {"record": item["record"]})
        for content in item.values():
            self._digest.update(hashlib.sha256(content).digest())
        text = " ".join(message.text for message in record.messages)
        facts["records"] += 1
        facts["images"] += len(images)
        facts["bytes"] += sum(map(len, item.values()))
        facts["image_bytes"] += len(item["images"])
        facts["words"].append(len(text.split()))
        facts["ids"].append(id_value(record, self.source)[0])
        if self._tokenizer is not None:
            facts["tokens"].append(len(self._tokenizer(text, add_special_tokens=False).input_ids))

    def finish(self, bad: Sequence[BadSample]) -> dict[str, Any]:
        """Close the files.

        Args:
            bad: records of the block that were left out.

        Returns:
            counts, hash and bad records of the block.
        """
        self._items.done()
        self._outlines.done()
        return {**self._facts, "digest": self._digest.hexdigest(), "bad": [sample._asdict() for sample in bad]}


def verified(
    image: Image, folder: Path, min_side: int = MIN_SIDE, videos: Videos | None = None
) -> tuple[bytes, PILImage.Image]:
    """The bytes of an image that decodes as a whole, and the picture: RGB, upright.

    Args:
        image: the image.
        folder: what its path is relative to.
        min_side: an image with a shorter side in pixels cannot be used.
        videos: keeps a video open for its next frame.

    Raises:
        RecordError: `too_small`, and as `image_bytes` and `open_image`.
    """
    content = image_bytes(image, folder, videos)
    name = image.path or "image"
    if not content:
        raise RecordError("corrupt_image", f"{name} is empty")
    picture = open_image(Image(path=image.path, data=content), folder)
    if min(picture.size) < min_side:
        raise RecordError("too_small", f"{name} has {picture.width}×{picture.height} pixels")
    return content, picture
