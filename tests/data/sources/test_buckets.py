"""Converted sets in a bucket: a real S3 server on this machine, several processes, a cache with a limit."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from lit_vlm.data import Converted
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.node_cache import NodeCache, Storage
from tests.data.sets.test_convert import picture

COUNT, SHARD = 40, 4096
ADDRESS = "s3://sets/pictures"


class Pictures(Source):
    """Records with a picture of random pixels each."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.name, self.count, self.seed, self.image_folder = "pictures", count, seed, Path()

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> Record:
        turns = (
            Message("user", (Image(data=picture(index + self.seed)), Text("?"))),
            Message("assistant", (Text(f"{self.seed} {index}"),)),
        )
        return Record(str(index), self.name, turns)

    def fingerprint(self) -> str:
        return f"pictures-{self.count}-{self.seed}"


class Bucket:
    """A bucket that counts what is fetched from it."""

    def __init__(self, port: int) -> None:
        self.options = {
            "endpoint_url": f"http://127.0.0.1:{port}",
            "aws_access_key_id": "a",
            "aws_secret_access_key": "b",
        }
        self.client = boto3.client("s3", region_name="us-east-1", **self.options)
        self.client.create_bucket(Bucket="sets")

    def put(self, folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.client.upload_file(str(file), "sets", f"pictures/{file.relative_to(folder)}")

    def source(self) -> Converted:
        return Converted(ADDRESS, storage_options=self.options)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        made = Bucket(server.get_host_and_port()[1])
        convert(Pictures(COUNT), tmp_path / "set", shard_bytes=SHARD)
        made.put(tmp_path / "set")
        yield made
    finally:
        server.stop()


@pytest.fixture
def fetched(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of the set was fetched: from the log of the server, whoever fetched it."""
    counts: Counter[str] = Counter()
    log = logging.getLogger("werkzeug")
    monkeypatch.setattr(log, "handlers", [_Gets(counts)])
    log.setLevel(logging.INFO)
    return counts


class _Gets(logging.Handler):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def emit(self, record: logging.LogRecord) -> None:
        if match := re.search(r"GET /sets/pictures/(\S+) ", record.getMessage()):
            self.counts[match[1]] += 1


def test_a_set_in_a_bucket_holds_what_the_folder_holds(bucket: Bucket, tmp_path: Path) -> None:
    near, far = Converted(str(tmp_path / "set")), bucket.source()
    assert len(near.info.chunks) > 5  # so that shards come and go
    assert far.info == near.info
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    assert [far.item(index) for index in order] == [near.item(index) for index in order]
    assert [far.outline(index).messages for index in order] == [near.outline(index).messages for index in order]


def _read(options: dict[str, str], indices: list[int]) -> list[str]:
    source = Converted(ADDRESS, storage_options=options)
    return [source.record(index).messages[1].text for index in indices]


@pytest.mark.slow
def test_the_processes_of_a_node_fetch_a_shard_once(bucket: Bucket, fetched: Counter[str]) -> None:
    orders = [np.random.default_rng(rank).permutation(COUNT).tolist() for rank in range(2)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_read, [(bucket.options, order) for order in orders])
    assert found == [[f"0 {index}" for index in order] for order in orders]
    shards = {name: count for name, count in fetched.items() if name.startswith("chunk-")}
    assert len(shards) == len(bucket.source().info.chunks)
    assert set(shards.values()) == {1}


def test_the_cache_keeps_to_its_limit_and_what_went_is_fetched_again(
    bucket: Bucket, fetched: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_VLM_CACHE_SIZE", "16KiB")
    source, most = bucket.source(), 0
    for index in np.random.default_rng(0).permutation(COUNT).tolist():
        assert source.record(index).messages[1].text == f"0 {index}"
        kept = [file.stat().st_size for file in (tmp_path / "cache").rglob("chunk-*.bin")]
        most = max(most, sum(kept))
    assert 8 * 1024 < most <= 16 * 1024
    assert max(fetched.values()) > 1


def test_the_shard_that_was_read_last_stays(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "set").glob("chunk-*.bin")}
    first, second, third = sorted(sizes)[:3]
    monkeypatch.setenv("LIT_VLM_CACHE_SIZE", str(sizes[first] + sizes[second] + sizes[third] - 1))
    for old, young in ((first, second), (second, first)):
        cache = NodeCache(Storage(ADDRESS, bucket.options), f"first {old}")
        for name, age in ((old, 200), (young, 100)):
            file = cache.file(name, sizes[name])
            os.utime(file, (file.stat().st_atime - age, file.stat().st_mtime - age))
        cache.file(third, sizes[third])
        kept = {file.name for file in cache.folder.glob("*.bin")}
        assert old not in kept
        assert third in kept


def test_a_new_set_at_an_old_address_is_not_mixed_with_the_old_one(bucket: Bucket, tmp_path: Path) -> None:
    assert bucket.source().record(3).messages[1].text == "0 3"
    convert(Pictures(COUNT, seed=7), tmp_path / "new", shard_bytes=SHARD)
    bucket.put(tmp_path / "new")
    assert bucket.source().record(3).messages[1].text == "7 3"


def test_what_cannot_be_read_is_said_in_a_line(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"s3://sets/other/lit_vlm.json cannot be read: ClientError: .*404"):
        Converted("s3://sets/other", storage_options=bucket.options)
    source = bucket.source()
    bucket.client.put_object(Bucket="sets", Key="pictures/chunk-000000.bin", Body=b"short")
    with pytest.raises(ValueError, match=r"pictures/chunk-000000.bin ends after 5 of [\d,]+ bytes"):
        source.record(0)
    monkeypatch.setenv("LIT_VLM_CACHE_SIZE", "100")
    with pytest.raises(ValueError, match=r"chunk-00000\d.bin has [\d,]+ bytes, more than LIT_VLM_CACHE_SIZE allows"):
        bucket.source().record(COUNT - 1)
    monkeypatch.setenv("LIT_VLM_CACHE_SIZE", "plenty")
    with pytest.raises(ValueError, match="LIT_VLM_CACHE_SIZE is a size such as 64MiB"):
        bucket.source().record(COUNT - 1)
