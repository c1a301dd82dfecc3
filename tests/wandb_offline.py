"""Reads what W&B writes offline: the file that `wandb sync` sends, a log of records in blocks as LevelDB has."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

HEADER, BLOCK = 7, 32768
"""Bytes in front of the file and of each piece of a record, and bytes of a block."""
FULL, FIRST, LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What one run has told W&B."""

    id: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: set[str] = field(default_factory=set)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    preempting: bool = False


def read_offline(folder: Path) -> OfflineRun:
    """The run of a folder `offline-run-*`."""
    (file,) = folder.glob("run-*.wandb")
    run = OfflineRun()
    for content in _records(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(content)
        match record.WhichOneof("record_type"):
            case "run":
                found = record.run
                run.id, run.name, run.group, run.job_type = (
                    found.run_id, found.display_name, found.run_group, found.job_type
                )  # fmt: skip
                run.tags |= set(found.tags)
                run.config |= _items(found.config.update)
            case "config":
                run.config |= _items(record.config.update)
            case "summary":
                run.summary |= _items(record.summary.update)
                for item in record.summary.remove:
                    run.summary.pop(_key(item), None)
            case "history":
                run.history.append(_items(record.history.item))
            case "files":
                run.files |= {one.path for one in record.files.files}
            case "preempting":
                run.preempting = True
    return run


def _items(items: Any) -> dict[str, Any]:
    return {_key(item): json.loads(item.value_json) for item in items}


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # the rest of a block that holds no head is empty
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEADER])
        piece = content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        parts = piece if kind in (FULL, FIRST) else parts + piece
        if kind in (FULL, LAST):
            yield parts
