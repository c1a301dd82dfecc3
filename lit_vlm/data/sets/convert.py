"""Conversion: any source → a set of LitData shards, in parallel, resumable, every image decoded once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from litdata.streaming.writer import BinaryWriter
from numpy.typing import NDArray
from transformers import AutoTokenizer

import lit_vlm
from lit_vlm.core.batch import BadSample
from lit_vlm.core.pretrained import resolve
from lit_vlm.data.records import Image, RecordError, Videos, image_bytes, open_image
from lit_vlm.data.records.json_files import read_info
from lit_vlm.data.sets.parallel import Block, blocks_of
from lit_vlm.data.sets.scan import id_value
from lit_vlm.data.sets.shards import CHUNK_BYTES, block_folder, claim, merge, read_block
from lit_vlm.data.sets.shared import ALONE, Place, finish_once, run_blocks
from lit_vlm.data.sources.base import Source, describe
from lit_vlm.data.sources.converted import INFO, RECORDS, VERSION, SetInfo, encode_record

BLOCK = 4096
"""Most records of a block."""
SMALLEST = 32
"""Fewest records of a block, but for the last."""
BLOCKS_WANTED = 256
"""Number of blocks of a source that is neither small nor large: enough for many processes to share evenly."""
LARGEST_SHARD = 1 << 31
"""Most bytes of a shard: LitData writes the places of items as 32-bit numbers."""


class TooManyBad(ValueError):
    """More records cannot be used than the conversion allows."""


@dataclass(frozen=True)
class ConvertBlock:
    """Writes one block of records into a folder of its own.

    Attributes:
        source: the source that is converted.
        min_side: an image with a shorter side in pixels cannot be used.
        tokenizer: source of the tokenizer that tokens are counted with; None counts none.
        shard_bytes: size of shards, to a record.
    """

    source: Source
    min_side: int
    tokenizer: str | None
    shard_bytes: int = CHUNK_BYTES

    def __call__(self, block: Block, folder: Path) -> dict[str, Any]:
        """Convert a block.

        Returns:
            counts, hash and bad records of the block.
        """
        items = BinaryWriter(str(folder), chunk_bytes=self.shard_bytes)
        outlines = BinaryWriter(str(folder / RECORDS), chunk_bytes=self.shard_bytes)
        tokenizer = AutoTokenizer.from_pretrained(resolve(self.tokenizer, weights=False)) if self.tokenizer else None
        digest = hashlib.sha256()
        stats: dict[str, Any] = {"records": 0, "images": 0, "image_bytes": 0, "words": [], "tokens": [], "ids": []}
        bad: list[BadSample] = []
        for index in range(block.start, block.end):
            identity = str(index)
            try:
                record = self.source.record(index)
                identity = record.id
                with Videos() as videos:
                    images = [self._verified(image, videos) for image in record.images]
            except RecordError as error:
                bad.append(BadSample(identity, self.source.name, error.reason, error.detail))
                continue
            item = encode_record(record, images)
            items.add_item(stats["records"], item)
            outlines.add_item(stats["records"], {"record": item["record"]})
            for content in item.values():
                digest.update(hashlib.sha256(content).digest())
            text = " ".join(message.text for message in record.messages)
            stats["records"] += 1
            stats["images"] += len(images)
            stats["image_bytes"] += len(item["images"])
            stats["words"].append(len(text.split()))
            stats["ids"].append(id_value(record, self.source)[0])
            if tokenizer is not None:
                stats["tokens"].append(len(tokenizer(text, add_special_tokens=False).input_ids))
        items.done()
        outlines.done()
        return {**stats, "digest": digest.hexdigest(), "bad": [sample._asdict() for sample in bad]}

    def _verified(self, image: Image, videos: Videos) -> tuple[bytes, tuple[int, int]]:
        """Bytes and (width, height) of an image that decodes as a whole."""
        content = image_bytes(image, self.source.image_folder, videos)
        name = image.path or "image"
        if not content:
            raise RecordError("corrupt_image", f"{name} is empty")
        picture = open_image(Image(path=image.path, data=content), self.source.image_folder)
        if min(picture.size) < self.min_side:
            raise RecordError("too_small", f"{name} has {picture.width}×{picture.height} pixels")
        return content, picture.size


def convert(
    source: Source,
    out: Path,
    workers: int = 0,
    max_bad_share: float = 0.05,
    min_side: int = 4,
    tokenizer: str | None = None,
    place: Place = ALONE,
    shard_bytes: int = CHUNK_BYTES,
) -> SetInfo:
    """Convert a source to a set, alone or together with other tasks; one that was stopped goes on where it was.

    The set is the same, byte for byte, whoever converted which block.

    Args:
        source: the source that is read.
        out: folder of the new set.
        workers: number of processes; 0 works in this one.
        max_bad_share: largest share of records that cannot be used, 0 to 1.
        min_side: an image with a shorter side in pixels cannot be used.
        tokenizer: source of the tokenizer that tokens are counted with; None counts none.
        place: which of the tasks that convert into this folder this is.
        shard_bytes: size of shards, to a record; the last one of a block is smaller.

    Returns:
        what `lit_vlm.json` of the set says.

    Raises:
        TooManyBad: when more than `max_bad_share` cannot be used; finished blocks stay, so a larger share goes on
            there.
        ValueError: when `out` holds something else, or lies inside the source; for shards above `LARGEST_SHARD`.
    """
    if not 0 < shard_bytes <= LARGEST_SHARD:
        raise ValueError(
            f"--shard-size: a shard has 1 to {LARGEST_SHARD:,} bytes, as its format counts so far, not {shard_bytes:,}"
        )
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(
            resolve(tokenizer, weights=False)
        )  # a wrong name fails before anything is written
    if (inside := getattr(source, "path", None)) is not None and out.resolve().is_relative_to(Path(inside).resolve()):
        raise ValueError(f"{out} lies inside the source {inside}, which would then read it: name another folder")
    plan = {
        "version": VERSION,
        "source": source.fingerprint(),
        "records": len(source),
        "reader": describe(source),
        "min_side": min_side,
    }
    # By the source alone, so that the set does not depend on the machine that begins it.
    if shard_bytes != CHUNK_BYTES:  # plans of earlier versions do not name it
        plan["shard_bytes"] = shard_bytes
    size = claim(out, plan | {"tokenizer": tokenizer}, max(SMALLEST, min(BLOCK, -(-len(source) // BLOCKS_WANTED))))
    blocks = blocks_of(len(source), size)
    if not (out / INFO).is_file():
        work = ConvertBlock(source, min_side, tokenizer, shard_bytes)
        run_blocks(blocks, work, out, f"converting {source.name}", workers, place)
    finish_once(out, INFO, lambda: _finish(source, out, blocks, max_bad_share, tokenizer))
    return read_info(out / INFO, SetInfo, VERSION)


def _check_share(bad: Sequence[BadSample], total: int, share: float, out: Path) -> None:
    if len(bad) > share * total or len(bad) == total:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(s.reason for s in bad).most_common())
        last = f"The first: {bad[0].id}: {bad[0].reason}: {bad[0].detail}. " if bad else ""
        raise TooManyBad(
            f"{len(bad)} of {total} records cannot be used ({reasons or 'the source is empty'}), more than "
            f"--max-bad-share {share}. {last}All are listed in {out / 'bad_samples.jsonl'}. "
            + ("" if len(bad) == total else "The same command with a larger share finishes at once")
        )


def _finish(source: Source, out: Path, blocks: Sequence[Block], max_bad_share: float, tokenizer: str | None) -> None:
    """Put the blocks together; `lit_vlm.json` comes last, so that a set that has it is whole."""
    parts = [_arrays(read_block(out, block.index)) for block in blocks]
    bad = [BadSample(**sample) for part in parts for sample in part["bad"]]
    with (out / "bad_samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample._asdict()) + "\n" for sample in bad)
    _check_share(bad, len(source), max_bad_share, out)
    has_images = any(part["images"] for part in parts)
    folders = [block_folder(out, index) for index in range(len(parts))]
    chunks = merge(folders, out)
    if has_images:
        merge([folder / RECORDS for folder in folders], out / RECORDS)
    words, ids = _joined(parts, "words"), _joined(parts, "ids")
    tokens = {"tokenizer": tokenizer, **_statistics(_joined(parts, "tokens"))} if tokenizer else {}
    info = SetInfo(
        version=VERSION,
        kit=lit_vlm.__version__,
        source={"class": type(source).__name__, "name": source.name, "fingerprint": source.fingerprint()},
        fingerprint=hashlib.sha256("".join(part["digest"] for part in parts).encode()).hexdigest()[:16],
        records=sum(part["records"] for part in parts),
        images=sum(part["images"] for part in parts),
        image_bytes=sum(part["image_bytes"] for part in parts),
        duplicate_ids=len(ids) - len(np.unique(ids)),
        chunks=chunks,
        parts=np.cumsum([part["records"] for part in parts]).tolist(),
        bad=dict(Counter(sample.reason for sample in bad).most_common()),
        words=_statistics(words),
        tokens=tokens,
    )
    info.write(out)


def _arrays(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a block, with its lists of numbers as arrays: those of all blocks are held at once."""
    return facts | {key: np.asarray(facts[key], np.int64) for key in ("words", "tokens", "ids")}


def _joined(parts: Sequence[dict[str, Any]], key: str) -> NDArray[np.int64]:
    return np.concatenate([part[key] for part in parts])


def _statistics(values: NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {}
    median, high = np.percentile(values, [50, 95])
    return {
        "sum": int(values.sum()),
        "mean": round(float(values.mean()), 2),
        "median": float(median),
        "p95": float(high),
        "max": int(values.max()),
    }
