"""A converted set: LitData shards of records with the encoded bytes of their images, on disk or in object storage.

Layout of a set:

- `index.json`, `chunk-*.bin`: LitData's; an item is `{"record": JSON, "images": bytes}`, the images end to end;
- `records/`: the same records without the bytes, for passes over all texts; absent when the set has no image;
- `lit_vlm.json`: the content's fingerprint, counts, statistics, and the version of this format;
- `bad_samples.jsonl`: what the conversion left out.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_vlm.core.written import write_whole
from lit_vlm.data.records import Content, Image, Message, Record, Text
from lit_vlm.data.records.json_files import read_info
from lit_vlm.data.records.media import refuse_marks
from lit_vlm.data.remote import fetch
from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.node_cache import NodeCache, Storage
from lit_vlm.data.sources.provenance import Provenance
from lit_vlm.data.sources.shard_reader import ShardReader

VERSION = 1
INFO = "lit_vlm.json"
RECORDS = "records"
SHUFFLED_CHUNKS = 16


@dataclass(frozen=True)
class SetInfo:
    """What `lit_vlm.json` of a converted set says.

    Attributes:
        version: version of the format.
        kit: version of lit-vlm that wrote the set.
        source: class, name and fingerprint of what was converted.
        fingerprint: a hash of all records and image bytes in order.
        records: number of records.
        images: number of images.
        image_bytes: size of all encoded images in bytes.
        duplicate_ids: number of records whose id an earlier record has.
        chunks: number of records in each chunk.
        parts: index behind the last record of each part that was converted at a time; the fingerprint is a hash of the
            parts' hashes.
        bad: reason → number of records that were left out for it.
        words: sum, mean, median, 95th percentile and maximum of words per record.
        tokens: these statistics of text tokens per record, with the tokenizer's name; empty without a tokenizer.
        captions: what wrote the captions of the set: model, prompts, decoding and checks; by source where a curation
            took several; empty where they are the source's own.
        provenance: licence, origin and revision of what was converted.
    """

    version: int
    kit: str
    source: dict[str, str]
    fingerprint: str
    records: int
    images: int
    image_bytes: int
    duplicate_ids: int = 0
    chunks: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    bad: dict[str, int] = field(default_factory=dict)
    words: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def write(self, folder: Path) -> None:
        """Write `lit_vlm.json`; it is the last file of a conversion."""
        write_whole(folder / INFO, json.dumps(asdict(self), indent=1) + "\n")


class Converted(Source):
    """A set that `lit-vlm data convert` wrote.

    Args:
        path: folder of the set, or an address in object storage (`s3://`, `gs://`, ...), whose shards are fetched as
            they are needed, once for all processes of a node (`NodeCache`). A set on the hub
            (`hf://datasets/ORG/NAME`) is fetched as a whole first.
        name: name of the source; default: that of the folder.
        storage_options: settings of the storage's client, as LitData takes them.

    Raises:
        ValueError: for a path that holds no converted set, or one that is damaged or of another format.
    """

    def __init__(self, path: str, name: str | None = None, storage_options: dict[str, Any] | None = None) -> None:
        if path.startswith("hf://"):  # which LitData reads as tables
            self._fetched = fetch(path, whole=True)
            self.path: str = str(self._fetched.path)
        else:
            self.path = path if ":" in path.split("/", 1)[0] else str(Path(path).expanduser())
        self.remote = ":" in self.path.split("/", 1)[0]
        self.storage_options = storage_options
        own = self._fetched.name if self._fetched else PurePosixPath(os.path.abspath(self.path)).name
        self.name = name if name is not None else own or "data"
        self.named = name is not None
        self.image_folder = Path()  # images are in the records
        self.info = self._read_info()
        self.chunked, self.provenance, self.captions = self.remote, self.info.provenance, self.info.captions
        self._readers: dict[str, tuple[int, ShardReader]] = {}

    def __len__(self) -> int:
        return self.info.records

    def record(self, index: int) -> Record:
        """The record at an index, with the bytes of its images.

        Raises:
            RecordError: as `refuse_marks`.
        """
        item = self.item(index)
        return refuse_marks(decode_record(item["record"], item["images"], self.name))

    def item(self, index: int) -> dict[str, bytes]:
        """The stored item of one record, as `encode_record` made it."""
        return self._reader("")[index]

    def outline(self, index: int) -> Record:
        """The record with the sizes of its images, without their bytes.

        Raises:
            RecordError: as `refuse_marks`.
        """
        item = self._reader(RECORDS if self.info.images else "")[index]
        return refuse_marks(decode_record(item["record"], None, self.name))

    def fingerprint(self) -> str:
        """The hash of all content, made by the conversion."""
        return self.info.fingerprint

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """All indices in random order, `[n]`.

        A set in object storage is read in groups of chunks: chunks are in random order, and records are shuffled within
        a group. So every chunk is fetched once in an epoch.
        """
        if not self.chunked:
            return generator.permutation(len(self))
        ends = np.cumsum(self.info.chunks)
        order = generator.permutation(len(ends))
        groups = [order[i : i + SHUFFLED_CHUNKS] for i in range(0, len(order), SHUFFLED_CHUNKS)]
        members = [
            np.concatenate([np.arange(ends[c] - self.info.chunks[c], ends[c]) for c in group]) for group in groups
        ]
        return np.concatenate([generator.permutation(indices) for indices in members])

    def _reader(self, part: str) -> ShardReader:
        """The reader of the items, or of the part that is named; one for each process."""
        pid, reader = self._readers.get(part, (0, None))
        if reader is None or pid != os.getpid():
            storage = Storage(self.path, self.storage_options)
            cache = NodeCache(storage, self.info.fingerprint) if self.remote else None
            reader = ShardReader(Path(self.path) / part, cache, part)
            self._readers[part] = (os.getpid(), reader)
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def _read_info(self) -> SetInfo:
        if not self.remote:
            return self._info_in(Path(self.path))
        with tempfile.TemporaryDirectory() as folder:
            Storage(self.path, self.storage_options).download(INFO, Path(folder) / INFO)
            return self._info_in(Path(folder))

    def _info_in(self, folder: Path) -> SetInfo:
        file = folder / INFO
        if not file.is_file():
            words = f"{self.path} OUT" if os.path.isfile(self.path) else f"SOURCE {self.path}"
            raise ValueError(
                f"{self.path} is no converted set: it has no {INFO}. lit-vlm data convert {words} makes one; a "
                "conversion that was stopped goes on with the same command"
            )
        return read_info(file, SetInfo, VERSION)


def encode_record(record: Record, images: Sequence[tuple[bytes, tuple[int, int]]]) -> dict[str, bytes]:
    """Make the stored item of a record.

    Args:
        record: the record.
        images: encoded bytes and (width, height) in pixels of each of its images, in order.

    Returns:
        `record`, JSON, and `images`, the bytes of all images end to end.
    """
    remaining = iter(images)

    def part_to_json(part: Content) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text} | ({} if part.loss is None else {"loss": part.loss})
        content, size = next(remaining)
        shown = {} if part.moment is None else {"moment": part.moment}
        return {"type": "image", "size": size, "bytes": len(content)} | shown

    def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [{"role": m.role, "content": [part_to_json(part) for part in m.content]} for m in messages]

    raw = (
        {"id": record.id, "messages": turns(record.messages)}
        | ({"options": record.options} if record.options else {})
        | ({"urls": record.urls} if record.urls else {})
        | ({"earlier": turns(record.earlier)} if record.earlier else {})
    )
    content = json.dumps(raw, ensure_ascii=False, separators=(",", ":")).encode()
    return {"record": content, "images": b"".join(image for image, _ in images)}


def decode_record(content: bytes, images: bytes | None, source: str) -> Record:
    """Make a record of its stored item.

    Args:
        content: JSON of the record.
        images: bytes of all images end to end; None gives images that know only their size.
        source: name of the record's source.
    """
    raw = json.loads(content)
    start = 0

    def parse(part: dict[str, Any]) -> Content:
        nonlocal start
        if part["type"] == "text":
            return Text(part["text"], part.get("loss"))
        end = start + part["bytes"]
        data = None if images is None else images[start:end]
        image = Image(data=data, size=tuple(part["size"]), moment=part.get("moment"))
        start = end
        return image

    messages, earlier = (
        tuple(Message(m["role"], tuple(parse(part) for part in m["content"])) for m in turns)
        for turns in (raw["messages"], raw.get("earlier", ()))
    )
    options, urls = (tuple(raw.get(key, ())) for key in ("options", "urls"))
    return Record(raw["id"], source, messages, options, urls, earlier)
