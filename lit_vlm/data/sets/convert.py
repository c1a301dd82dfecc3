"""Conversion: any source → a set of LitData shards, in parallel, resumable, every image decoded once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

import lit_vlm
from lit_vlm.core.batch import BadSample
from lit_vlm.core.pretrained import resolve
from lit_vlm.data.records import RecordError, Videos
from lit_vlm.data.records.json_files import read_info
from lit_vlm.data.sets.engine import HERE, Engine, paths_of
from lit_vlm.data.sets.parallel import Block, blocks_of
from lit_vlm.data.sets.shards import CHUNK_BYTES, block_folder, claim, merge, read_block
from lit_vlm.data.sets.shared import finish_once, run_blocks
from lit_vlm.data.sets.writer import MIN_SIDE, BlockWriter, verified
from lit_vlm.data.sources.base import Source, describe
from lit_vlm.data.sources.converted import INFO, RECORDS, VERSION, SetInfo

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
        writer = BlockWriter(folder, self.source, self.tokenizer, self.shard_bytes)
        bad: list[BadSample] = []
        for index in range(block.start, block.end):
            identity = str(index)
            try:
                record = self.source.record(index)
                identity = record.id
                with Videos() as videos:
                    read = (verified(i, self.source.image_folder, self.min_side, videos) for i in record.images)
                    images = [(content, picture.size) for content, picture in read]
            except RecordError as error:
                bad.append(BadSample(identity, self.source.name, error.reason, error.detail))
                continue
            writer.add(record, images)
        return writer.finish(bad)


def convert(
    source: Source,
    out: Path,
    engine: Engine = HERE,
    max_bad_share: float = 0.05,
    min_side: int = MIN_SIDE,
    tokenizer: str | None = None,
    shard_bytes: int = CHUNK_BYTES,
) -> SetInfo:
    """Convert a source to a set, alone or together with other tasks; one that was stopped goes on where it was.

    The set is the same, byte for byte, whoever converted which block.

    Args:
        source: the source that is read.
        out: folder of the new set.
        engine: starts the workers; it knows which of the tasks that convert into this folder this is.
        max_bad_share: largest share of records that cannot be used, 0 to 1; those that a deny-list names do not count.
        min_side: an image with a shorter side in pixels cannot be used.
        tokenizer: source of the tokenizer that tokens are counted with; None counts none.
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
    check_limits(max_bad_share, min_side)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(
            resolve(tokenizer, weights=False)
        )  # a wrong name fails before anything is written
    refuse_inside(out, source)
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
        run_blocks(blocks, work, out, f"converting {source.name}", engine, paths_of(source))
    finish_once(out, INFO, lambda: finish_set(source, out, blocks, max_bad_share, tokenizer, source.captions))
    return _told(read_info(out / INFO, SetInfo, VERSION), source, out)


def refuse_inside(out: Path, *sources: Source) -> None:
    """Refuse a folder that lies inside what is read.

    Args:
        out: the folder of a result.
        sources: what is read.

    Raises:
        ValueError: where it lies inside the path of one of them.
    """
    for source in sources:
        if source.path is not None and out.resolve().is_relative_to(Path(source.path).resolve()):
            raise ValueError(
                f"{out} lies inside the source {source.path}, which would then read it: name another folder"
            )


def check_limits(max_bad_share: float, min_side: int) -> None:
    """Refuse limits that nothing can meet or break.

    Raises:
        ValueError: for a share that is not from 0 to 1, or a side below 1 pixel.
    """
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"--max-bad-share must be from 0 to 1, not {max_bad_share:g}")
    if min_side < 1:
        raise ValueError(f"--min-side must be at least 1, not {min_side}")


def _told(info: SetInfo, source: Source, out: Path) -> SetInfo:
    """What `lit_vlm.json` says, with what the source says now of where it comes from."""
    known = info.provenance | source.provenance
    if known != info.provenance:  # the set was whole before; its content stays as it is
        info = replace(info, provenance=known)
        info.write(out)
    return info


def _check_share(bad: Sequence[BadSample], total: int, share: float, out: Path) -> None:
    faulty = [sample for sample in bad if sample.faulty]
    if len(faulty) > share * total or len(bad) == total:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(s.reason for s in bad).most_common())
        first = next(iter(faulty or bad), None)
        last = f" The first: {first.id}: {first.reason}: {first.detail}." if first else ""
        listed = f"All are listed in {out / 'bad_samples.jsonl'}."
        if len(bad) == total:
            raise TooManyBad(
                f"none of the {total} records can be used ({reasons or 'the source is empty'}).{last} {listed}"
            )
        raise TooManyBad(
            f"{len(bad)} of {total} records cannot be used ({reasons}), more than --max-bad-share {share}.{last} "
            f"{listed} The same command with a larger share finishes at once"
        )


def finish_set(
    source: Source,
    out: Path,
    blocks: Sequence[Block],
    max_bad_share: float,
    tokenizer: str | None = None,
    captions: Mapping[str, Any] | None = None,
) -> None:
    """Put the blocks of a set together; `lit_vlm.json` comes last, so that a set that has it is whole.

    Args:
        source: what the set is made of.
        out: folder of the set; its blocks were written with `BlockWriter`, and are whole.
        blocks: all of them.
        max_bad_share: largest share of records that cannot be used, 0 to 1.
        tokenizer: source of the tokenizer that tokens were counted with.
        captions: what wrote the captions, for `SetInfo.captions`.

    Raises:
        TooManyBad: when more than `max_bad_share` cannot be used.
    """
    parts = [_arrays(read_block(out, block.index)) for block in blocks]
    bad = [BadSample(**sample) for part in parts for sample in part["bad"]]
    with (out / "bad_samples.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(sample._asdict()) + "\n" for sample in bad)
    _check_share(bad, len(bad) + sum(part["records"] for part in parts), max_bad_share, out)
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
        source={
            "class": type(source).__name__,
            "name": source.name,
            "fingerprint": source.fingerprint(),
        },
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
        captions=dict(captions or {}),
        provenance=source.provenance,
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
