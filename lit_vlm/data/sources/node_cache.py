"""The shards of a bucket on this node's disk: each is fetched once for all processes, and the oldest go.

The files lie in `LIT_VLM_CACHE/shards`, which must be of this node: files of a network would be read over it twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from litdata.streaming.client import S3Client
from litdata.streaming.downloader import get_downloader

from lit_vlm.core.cache import cache_dir
from lit_vlm.core.sizes import parse_size

SIZE = "LIT_VLM_CACHE_SIZE"
"""Environment variable: most bytes of all shards in the cache."""
SHARE = 0.75
"""Share of the disk that is free, or taken by shards, that they may take where `LIT_VLM_CACHE_SIZE` says nothing."""
FREED = 0.1
"""Share of the most bytes that is freed at a time, so that files are seldom looked through."""
LOCKS = 64
"""Number of locks that fetches of a set share."""
FRESH = 5.0
"""Seconds after which a shard that is read is marked as used again."""


class Storage:
    """A folder in a bucket.

    Args:
        address: `s3://BUCKET/FOLDER`, `gs://...`, or another that LitData reads.
        options: settings of the storage's client, as LitData takes them.
    """

    def __init__(self, address: str, options: dict[str, Any] | None = None) -> None:
        self.address, self.options = address, options

    def download(self, name: str, file: Path) -> None:
        """Fetch an object into a file that is not there yet.

        Args:
            name: its path below the address.
            file: the file.

        Raises:
            ValueError: when it cannot be fetched; names address and reason.
        """
        address = f"{self.address}/{name}"
        try:
            if urlsplit(address).scheme == "s3":
                bucket, _, key = address.removeprefix("s3://").partition("/")
                self._s3.client.download_file(bucket, key, str(file))
            else:
                get_downloader(self.address, str(file.parent), [], self.options).download_file(address, str(file))
            if not file.is_file():
                raise FileNotFoundError("it is not there")
        except Exception as error:  # each storage's client has errors of its own
            raise ValueError(f"{address} cannot be read: {type(error).__name__}: {error}") from error
        finally:
            file.with_name(file.name + ".lock").unlink(missing_ok=True)

    @cached_property
    def _s3(self) -> S3Client:
        # LitData's own downloader takes obstore here, which forked loader processes must not share, and which does not
        # speak plain HTTP to a storage of one's own.
        return S3Client(storage_options=self.options)


class NodeCache:
    """Files of one set in a bucket, as they are needed.

    A process that needs a file while another fetches it waits for that. A file is removed when it was not read for the
    longest time; a process that has it open reads on, and one that comes back to it fetches it again.

    Args:
        storage: folder of the set in the bucket.
        mark: fingerprint of the set, so that shards of an earlier one at the same address are not taken for its own.
    """

    def __init__(self, storage: Storage, mark: str) -> None:
        self.storage = storage
        self.root = cache_dir() / "shards"
        self.folder = self.root / hashlib.sha256(f"{storage.address} {mark}".encode()).hexdigest()[:24]
        self._used: dict[str, float] = {}

    def file(self, name: str, size: int = 0) -> Path:
        """A file of the set on this node, fetched where it is not there.

        Args:
            name: its path below the address.
            size: bytes that it has at least.

        Raises:
            ValueError: when it cannot be fetched, ends early, or is larger than the cache; names file and reason.
        """
        file = self.folder / name
        if not self._touched(name, file):
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % LOCKS
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{number}.lock"):
                if not self._touched(name, file):
                    self._fetch(name, file, size)
            self._used[name] = time.monotonic()
        return file

    def _touched(self, name: str, file: Path) -> bool:
        """Mark a file as used, so that others go first; False if it is not there."""
        now = time.monotonic()
        if now - self._used.get(name, -FRESH) < FRESH:
            return file.exists()
        try:
            os.utime(file)
        except FileNotFoundError:
            return False
        self._used[name] = now
        return True

    def _fetch(self, name: str, file: Path, size: int) -> None:
        address = f"{self.storage.address}/{name}"
        self._make_room(size, address)
        scratch = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
        try:
            self.storage.download(name, scratch)
            if (found := scratch.stat().st_size) < size:
                raise ValueError(f"{address} ends after {found:,} of {size:,} bytes: it was not copied as a whole")
            scratch.replace(file)
        finally:
            scratch.unlink(missing_ok=True)

    @cached_property
    def limit(self) -> int:
        """Most bytes of all shards in the cache; raises ValueError as `parse_size`."""
        if given := os.environ.get(SIZE):
            return parse_size(given, SIZE)
        return int(SHARE * (shutil.disk_usage(self.root).free + sum(size for _, _, size in self._files())))

    def _make_room(self, size: int, address: str) -> None:
        """Count a file that comes, and remove those that were not read for the longest time if there is no room."""
        with FileLock(self.root / "size.lock"):
            counted = self.root / "size"
            text = counted.read_text() if counted.is_file() else ""
            total = int(text) if text.isdecimal() else self.limit  # what cannot be read is counted anew
            if total + size > self.limit:
                total = self._evict(size, address)
            counted.write_text(str(total + size))

    def _evict(self, size: int, address: str) -> int:
        if size > self.limit:
            raise ValueError(f"{address} has {size:,} bytes, more than {SIZE} allows ({self.limit:,}): set it larger")
        files = sorted(self._files())
        total = sum(taken for _, _, taken in files)
        goal = max(0, int((1 - FREED) * self.limit) - size) if total + size > self.limit else total
        for _, file, taken in files:
            if total <= goal:
                break
            file.unlink(missing_ok=True)
            total -= taken
        return total

    def _files(self) -> list[tuple[float, Path, int]]:
        """When each shard of all sets was used last, its file, and its bytes."""
        found = []
        for file in self.root.rglob("chunk-*.bin"):
            try:
                facts = file.stat()
            except FileNotFoundError:
                continue
            found.append((facts.st_mtime, file, facts.st_size))
        return found
