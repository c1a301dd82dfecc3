"""Verification of a converted set: whether all files are there and hold what its index says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.data.records import Image, RecordError, open_image
from lit_vlm.data.records.json_files import read_json
from lit_vlm.data.sets.engine import HERE, Engine, paths_of
from lit_vlm.data.sets.parallel import Block, map_blocks
from lit_vlm.data.sources.converted import RECORDS, Converted, decode_record


@dataclass(frozen=True)
class _CheckBlock:
    """Finds the problems of a block of records, and the hashes of their content."""

    source: Converted
    decode: bool

    def __call__(self, block: Block) -> tuple[list[str], bytes]:
        problems: list[str] = []
        digests: list[bytes] = []
        for index in range(block.start, block.end):
            try:
                item = self.source.item(index)
            except Exception as error:
                problems.append(f"record {index} cannot be read: {type(error).__name__}: {error}")
                continue
            for content in item.values():
                digests.append(hashlib.sha256(content).digest())
            problems += [f"record {index}: {problem}" for problem in self._problems(item, index)]
        return problems, b"".join(digests)

    def _problems(self, item: dict[str, bytes], index: int) -> Iterator[str]:
        try:
            record = decode_record(item["record"], item["images"], self.source.name)
        except (ValueError, KeyError, TypeError) as error:
            yield f"is no record: {type(error).__name__}: {error}"
            return
        if sum(len(image.data or b"") for image in record.images) != len(item["images"]):
            yield "its images and their sizes in bytes do not agree"
        try:
            same = self.source.outline(index) == decode_record(item["record"], None, self.source.name)
        except Exception as error:
            yield f"its entry in {RECORDS}/ cannot be read: {type(error).__name__}: {error}"
        else:
            if not same:
                yield f"differs from its entry in {RECORDS}/"
        for number, image in enumerate(record.images if self.decode else ()):
            try:
                size = open_image(Image(data=image.data), Path()).size
            except RecordError as error:
                yield f"image {number}: {error}"
                continue
            if size != image.size:
                yield f"image {number} has {size[0]}×{size[1]} pixels, its record says {image.size}"


def check_set(path: str, decode: bool, engine: Engine = HERE) -> list[str]:
    """Find what is wrong with a converted set.

    Args:
        path: folder or address of the set.
        decode: decode every image, too.
        engine: starts the workers.

    Returns:
        the problems, each as a line of text; empty if the set is whole.

    Raises:
        ValueError: when it is no converted set.
    """
    source = Converted(path)
    problems = list(_missing_files(source))
    if problems:
        return problems
    # The fingerprint is a hash of hashes, one for each part that was converted at a time.
    blocks = [
        Block(i, start, end)
        for i, (start, end) in enumerate(zip([0, *source.info.parts], source.info.parts, strict=False))
    ]
    digest = hashlib.sha256()
    work, title = _CheckBlock(source, decode), f"checking {source.name}"
    for found, digests in map_blocks(blocks, work, engine, title, paths_of(source)):
        problems += found
        digest.update(hashlib.sha256(digests).hexdigest().encode())
    if not problems and digest.hexdigest()[:16] != source.info.fingerprint:
        problems.append(f"the content has changed: its fingerprint is no longer {source.info.fingerprint}")
    return problems


def _missing_files(source: Converted) -> Iterator[str]:
    """Yield problems with LitData's indices and the chunks that they name; nothing for a set in object storage."""
    if source.remote:
        return
    for folder in (Path(source.path), Path(source.path) / RECORDS):
        index = folder / "index.json"
        if not index.is_file():
            if folder.name != RECORDS or source.info.images:
                yield f"{index} is missing"
            continue
        try:
            chunks = read_json(index)["chunks"]
        except (ValueError, KeyError, TypeError) as error:
            yield str(error) if isinstance(error, ValueError) else f"{index} is damaged: it lists no chunks"
            continue
        count = sum(chunk["chunk_size"] for chunk in chunks)
        if count != source.info.records:
            yield f"{index} counts {count} records, {source.info.records} were converted"
        for chunk in chunks:
            file = folder / chunk["filename"]
            if not file.is_file():
                yield f"{file} is missing"
