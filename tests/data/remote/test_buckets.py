"""Buckets: a real S3 server on loopback, with and without trouble on the way, and Google's language."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import boto3
import pytest
from moto.server import ThreadedMotoServer

from lit_vlm.data.given import DataPath, as_sources
from lit_vlm.data.records import open_image
from lit_vlm.data.remote import fetch, revision_of
from lit_vlm.data.remote.store import PIECE
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.forms import open_source
from lit_vlm.data.sources import ChatJsonl, Converted, WebDataset
from lit_vlm.data.sources.base import describe
from tests.data.remote.servers import Answer, Before, Server, ranged, running
from tests.data.remote.test_hub import a_new_process, texts

BUCKET = "pile"
NOISE = random.Random(0).randbytes(4 * PIECE)


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def way(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Before]:
    """What stands between the kit and the S3 server."""
    with running(Before(moto)) as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.address,
            "AWS_ACCESS_KEY_ID": "mine",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "LIT_VLM_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("lit_vlm.data.remote.store.FIRST_WAIT", 0.01)
        yield server


@pytest.fixture
def s3(moto: str, way: Before) -> Any:
    """A client of the server, past what stands in between; the bucket is empty."""
    client = boto3.client("s3", endpoint_url=moto)
    client.create_bucket(Bucket=BUCKET)
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    return client


def rows(png: Callable[..., bytes], count: int = 3) -> dict[str, bytes]:
    """A chat file with pictures beside it."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": f"a {n}"}],
                    "images": [f"images/{n} ü.png"]})
        for n in range(count)
    ]  # fmt: skip
    pictures = {f"images/{n} ü.png": png(colour=(n, 0, 0)) for n in range(count + 2)}
    return {"mine.jsonl": "\n".join(lines).encode(), **pictures}


def put(client: Any, files: dict[str, bytes], folder: str = "set") -> None:
    for name, content in files.items():
        client.put_object(Bucket=BUCKET, Key=f"{folder}/{name}", Body=content)


def test_a_file_its_pictures_and_a_conversion(
    s3: Any, way: Before, png: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, rows(png))
    put(s3, {"other.png": png()}, "another")
    source = open_source(f"s3://{BUCKET}/set/mine.jsonl")
    assert isinstance(source, ChatJsonl)
    assert texts(source) == ["a 0", "a 1", "a 2"]  # type: ignore[arg-type]
    assert open_image(source.record(2).images[0], source.image_folder).getpixel((0, 0)) == (2, 0, 0)
    assert len([path for path, _ in way.bodies() if path.endswith(".png")]) == 3
    assert f"s3://{BUCKET}/set/mine.jsonl (revision {revision_of(source.path)})" in describe(source)
    info = convert(source, tmp_path / "set")
    assert (info.records, info.bad) == (3, {})
    assert (info.provenance.origin or "").startswith(f"s3://{BUCKET}/set/mine.jsonl (revision ")
    # What was converted is read from the bucket as it is needed, by LitData, whose faster client takes no plain HTTP.
    monkeypatch.setattr("litdata.streaming.downloader._OBSTORE_AVAILABLE", False)
    for file in (tmp_path / "set").rglob("*"):
        if file.is_file():
            s3.put_object(Bucket=BUCKET, Key=f"made/{file.relative_to(tmp_path / 'set')}", Body=file.read_bytes())
    (converted,) = as_sources(DataPath(f"s3://{BUCKET}/made"), "data.train")
    assert isinstance(converted, Converted)
    assert converted.remote
    assert converted.record(1).messages[-1].text == "a 1"
    (again,) = as_sources(DataPath(f"s3://{BUCKET}/set/mine.jsonl"), "data.train")
    assert isinstance(again, ChatJsonl)


def test_cut_connections_and_a_busy_server(s3: Any, way: Before) -> None:
    put(s3, {"noise.tar": NOISE})
    way.faults["set/noise.tar"] = [PIECE + 9, None, 2 * PIECE + 9]
    assert fetch(f"s3://{BUCKET}/set/noise.tar").path.read_bytes() == NOISE
    spans = [span for path, span in way.bodies() if path.endswith("noise.tar")]
    assert spans[0] is None
    first, again, second = (int(span.removeprefix("bytes=").removesuffix("-")) for span in spans[1:] if span)
    assert 0 < first == again <= PIECE + 9  # what had come stays, but for what the client held back
    assert first < second <= first + 2 * PIECE + 9


def test_an_object_that_changes_meanwhile_is_fetched_anew(s3: Any, way: Before) -> None:
    """The connection is cut, and when it is taken up again the object is another one: no mixture of both."""
    put(s3, {"noise.tar": NOISE})
    new = NOISE[::-1]

    class Writer(Before):
        def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
            if "Range" in headers and not written:
                put(s3, {"noise.tar": new})
                written.append(path)
            return super().answer(method, path, headers)

    written: list[str] = []
    way.answer = Writer(way.upstream).answer  # type: ignore[method-assign]
    way.faults["set/noise.tar"] = [2 * PIECE]
    found = fetch(f"s3://{BUCKET}/set/noise.tar")
    assert written
    assert found.path.read_bytes() == new


def test_a_changed_object_is_another_source(
    s3: Any, make_tar: Callable[[dict[str, bytes]], bytes], png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = make_tar({"a.png": png(), "a.txt": b"one"})
    put(s3, {"0.tar": tar, "1.tar": make_tar({"b.png": png(), "b.txt": b"two"}), "readme.md": b"x"})
    old = WebDataset(f"s3://{BUCKET}/set")
    assert texts(old) == ["one", "two"]
    a_new_process(monkeypatch)
    assert WebDataset(f"s3://{BUCKET}/set").fingerprint() == old.fingerprint()
    put(s3, {"0.tar": make_tar({"a.png": png(), "a.txt": b"ONE"})})  # of the same size, under the same names
    a_new_process(monkeypatch)
    new = WebDataset(f"s3://{BUCKET}/set/")
    assert texts(new) == ["ONE", "two"]
    assert new.fingerprint() != old.fingerprint()
    assert texts(old) == ["one", "two"]


def test_a_wrong_checksum_and_one_that_is_none(s3: Any, way: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3, {"noise.tar": NOISE})
    flipped = bytes([NOISE[0] ^ 1]) + NOISE[1:]

    def answer(method: str, path: str, headers: dict[str, str]) -> Answer:
        status, more, body = Before.answer(way, method, path, headers)
        return status, more, flipped if body == NOISE else body

    way.answer = answer  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=f"s3://{BUCKET}/set/noise.tar cannot be fetched: its content has the MD5"):
        fetch(f"s3://{BUCKET}/set/noise.tar")
    # Where the storage encrypts with a key of its own, the tag is no checksum of the content.
    s3.put_object(Bucket=BUCKET, Key="set/noise.tar", Body=NOISE, ServerSideEncryption="aws:kms")
    a_new_process(monkeypatch)
    assert fetch(f"s3://{BUCKET}/set/noise.tar").path.read_bytes() == flipped


def test_what_is_not_there_or_not_allowed(s3: Any, way: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3, {"a.txt": b"x"})
    for address, said in {
        f"s3://{BUCKET}/none.jsonl": f"there is no s3://{BUCKET}/none.jsonl: no object has that key",
        "s3://nobody/": "s3://nobody/: there is no bucket nobody",
        f"s3://{BUCKET}/set": f"s3://{BUCKET}/set holds none of .tar, .parquet, .jsonl or images",
    }.items():
        with pytest.raises(ValueError, match=said):
            open_source(address)
    denied = b"<Error><Code>ExpiredToken</Code></Error>"
    for status in (400, 403):
        way.answer = lambda *_, status=status: (status, {}, denied)  # type: ignore[method-assign]
        a_new_process(monkeypatch)
        with pytest.raises(ValueError, match=r"may not be read \(ExpiredToken\): AWS_PROFILE or AWS_ACCESS_KEY_ID"):
            fetch(f"s3://{BUCKET}/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=f"s3://{BUCKET}/set cannot be reached: Could not connect to the endpoint"):
        fetch(f"s3://{BUCKET}/set")


class Google(Server):
    """Google Cloud Storage's JSON API: key → content, of which the latest generation is listed, two to a page."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__()
        self.objects = objects

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        place, _, query = path.partition("?")
        given = {key: values[0] for key, values in parse_qs(query).items()}
        if place == f"/storage/v1/b/{BUCKET}/o":
            start = int(given.get("pageToken", 0))
            keys = [key for key in sorted(self.objects) if key.startswith(given.get("prefix", ""))]
            more = {"nextPageToken": str(start + 2)} if start + 2 < len(keys) else {}
            return 200, {}, json.dumps({"items": [self._item(key) for key in keys[start : start + 2]], **more}).encode()
        key = unquote(place).removeprefix(f"/download/storage/v1/b/{BUCKET}/o/")
        if key not in self.objects or given["generation"] != self._item(key)["generation"]:
            return 404, {}, b""
        return ranged(self, self.objects[key], headers, {})

    def _item(self, key: str) -> dict[str, str]:
        content = self.objects[key]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        generation = str(int(hashlib.sha1(content).hexdigest()[:12], 16))
        return {"name": key, "size": str(len(content)), "md5Hash": md5, "generation": generation}


def test_google_cloud_storage(tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_vlm.data.remote.store.FIRST_WAIT", 0.01)
    with running(Google({f"set/{name}": content for name, content in rows(png).items()})) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        source = open_source(f"gs://{BUCKET}/set/mine.jsonl")
        assert source.record(1).messages[-1].text == "a 1"
        assert open_image(source.record(1).images[0], source.image_folder).getpixel((0, 0)) == (1, 0, 0)
        server.objects["noise.tar"] = NOISE
        server.faults["noise.tar"] = [2 * PIECE + 9, None]
        assert fetch(f"gs://{BUCKET}/noise.tar").path.read_bytes() == NOISE
        assert server.bodies()[-1][1] == f"bytes={2 * PIECE}-"
        with pytest.raises(ValueError, match=f"there is no gs://{BUCKET}/none"):
            fetch(f"gs://{BUCKET}/none")
        with pytest.raises(ValueError, match="gs://other/x: there is no bucket other"):
            fetch("gs://other/x")
        server.objects["set/mine.jsonl"] = server.objects["set/mine.jsonl"].replace(b"a 1", b"b 1")
        a_new_process(monkeypatch)
        assert open_source(f"gs://{BUCKET}/set/mine.jsonl").fingerprint() != source.fingerprint()
        server.answer = lambda *_: (403, {}, b"")  # type: ignore[method-assign]
        a_new_process(monkeypatch)
        with pytest.raises(ValueError, match=f"gs://{BUCKET}/set may not be read .*gcloud auth application-default"):
            fetch(f"gs://{BUCKET}/set")
