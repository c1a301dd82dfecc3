"""Data sets of the hub, from a server on loopback that answers as its API of files does."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_vlm.data.given import DataPath, as_sources
from lit_vlm.data.records import open_image
from lit_vlm.data.remote import fetch, origin_of, place_of, revision_of
from lit_vlm.data.remote.store import PIECE
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.forms import open_source, recognise_address
from lit_vlm.data.sources import Captions, Converted, LlavaJson, Parquet, Pictures, Texts, WebDataset
from lit_vlm.data.sources.base import describe
from tests.data.remote.servers import TOKEN, DataHub, ask_this_hub, running

NAME = "lab/drawings"
ROOT = f"hf://datasets/{NAME}"
CARD = """---
license: cc-by-4.0
configs:
- config_name: shapes
  data_files:
  - split: train
    path: shapes/train-*
  - split: test
    path: shapes/test-*
- config_name: talks
  data_files:
  - split: train
    path: talks/train-*
---
# Drawings
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataHub]:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_vlm.data.remote.store.FIRST_WAIT", 0.01)
    with running(DataHub()) as server:
        ask_this_hub(server, monkeypatch)
        yield server


def table(png: Callable[..., bytes], *captions: str, noise: int = 0) -> bytes:
    """A parquet file with a picture and a caption in each row, and so many bytes of noise."""
    rows = [
        {
            "image": {"bytes": png(colour=(n, 0, 0)), "path": None},
            "caption": caption,
            "id": f"{n}{random.Random(n).randbytes(noise).hex()}",
        }
        for n, caption in enumerate(captions)
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.fixture
def drawings(hub: DataHub, png: Callable[..., bytes]) -> DataHub:
    hub.commit(
        NAME,
        {
            "README.md": CARD.encode(),
            "shapes/train-00000-of-00002.parquet": table(png, "one", "two"),
            "shapes/train-00001-of-00002.parquet": table(png, "three"),
            "shapes/test-00000-of-00001.parquet": table(png, "four"),
            "talks/train-00000-of-00001.parquet": table(png, "five"),
        },
    )
    return hub


def a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes of an earlier time were answered is not taken any more."""
    time.sleep(0.01)
    monkeypatch.setattr("lit_vlm.core.fetch.STARTED", time.time())


def texts(source: Parquet | LlavaJson | Captions | WebDataset) -> list[str]:
    return [source.record(index).messages[-1].text for index in range(len(source))]


def test_a_split_is_read_and_nothing_else_is_fetched(drawings: DataHub) -> None:
    source = open_source(f"{ROOT}#shapes/train")
    assert isinstance(source, Parquet)
    assert source.name == "drawings-shapes"
    assert texts(source) == ["one", "two", "three"]
    read = [path for path, _ in drawings.bodies() if "/resolve/" in path]
    assert sorted(path.rpartition("/")[2] for path in read if "README" not in path) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    sha = drawings.sha(NAME, 0)
    assert f"{ROOT}@{sha}" in describe(source)
    assert revision_of(source.path) == sha
    before = len(drawings.asked)
    assert texts(Parquet(f"{ROOT}#shapes/test")) == ["four"]
    assert texts(Parquet(f"{ROOT}/shapes")) == ["four", "one", "two", "three"]
    assert not [path for _, path, _ in drawings.asked[before:] if "train-" in path]  # each content once
    assert texts(Parquet(f"{ROOT}#talks")) == ["five"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://datasets/lab/typo", "there is no hf://datasets/lab/typo at http://127.0.0.1.*check the spelling"),
        (ROOT, f"{ROOT} has 2 configurations; name one, as in {ROOT}#shapes: shapes, talks"),
        (f"{ROOT}#squares", f"{ROOT} has no configuration 'squares', only shapes, talks"),
        (f"{ROOT}#shapes", f"{ROOT}#shapes has 2 splits; name one, as in {ROOT}#shapes/train: train, test"),
        (f"{ROOT}#shapes/dev", f"{ROOT}#shapes has no split 'dev', only train, test"),
        (f"{ROOT}@v2#shapes/train", f"{ROOT} has no revision 'v2'"),
        (f"{ROOT}/mine.json", f"there is no {ROOT}/mine.json"),
        (f"{ROOT}/shapes#talks", "names a path and a configuration"),
        ("hf://lab/drawings", "hf://lab/drawings is no address of a data set of the hub: write hf://datasets/ORG/NAME"),
        ("ftp://host/x", "addresses begin with hf://datasets/ORG/NAME, .*; 'ftp://' is not read"),
        ("s3:///x", "names no bucket"),
        (f"{ROOT}/../x", "no empty parts"),
    ],
)
def test_wrong_addresses_get_one_line(address: str, said: str, drawings: DataHub) -> None:
    with pytest.raises(ValueError, match=said) as error:
        open_source(address)
    assert "\n" not in str(error.value)


def test_gated_sets_and_wrong_tokens(drawings: DataHub, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings.gated.add(NAME)
    with pytest.raises(ValueError, match="its authors want an agreement first: .*set HF_TOKEN"):
        fetch(f"{ROOT}#talks")
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    with pytest.raises(ValueError, match="refuses the token, which is wrong or expired; a token comes from HF_TOKEN"):
        fetch(f"{ROOT}#talks")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert texts(Parquet(f"{ROOT}#talks")) == ["five"]


def test_a_cut_connection_and_a_busy_server(drawings: DataHub, png: Callable[..., bytes]) -> None:
    drawings.sets[NAME][0]["talks/train-00000-of-00001.parquet"] = large = table(png, "five", noise=1 << 20)
    drawings.faults["talks/train-00000-of-00001.parquet"] = [PIECE + 9, None, 2 * PIECE + 9, None]
    drawings.faults[f"datasets/{NAME}"] = [None]
    assert texts(Parquet(f"{ROOT}#talks")) == ["five"]
    spans = [span for path, span in drawings.bodies() if path.endswith("talks/train-00000-of-00001.parquet")]
    first, second = f"bytes={PIECE}-", f"bytes={3 * PIECE}-"
    assert spans == [None, first, first, second, second]
    assert len(large) > 3 * PIECE
    assert drawings.faults[f"datasets/{NAME}"] == []


def test_a_wrong_checksum_is_asked_for_again_and_refused(drawings: DataHub, tmp_path: Path) -> None:
    drawings.wrong.add("talks/train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="talks/train-00000-of-00001.parquet cannot be fetched: its content has the "
                                         "SHA256 .* as the server says"):  # fmt: skip
        fetch(f"{ROOT}#talks")
    assert not [file for file in (tmp_path / "cache").rglob("blobs/*") if file.is_file()]
    assert len([path for path, _ in drawings.bodies() if "talks/train" in path]) == 2


def test_a_new_revision_is_another_source(
    drawings: DataHub, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawings.sha(NAME, 0)
    old = Parquet(f"{ROOT}#talks")
    changed = drawings.sets[NAME][0] | {"talks/train-00000-of-00001.parquet": table(png, "six")}
    second = drawings.commit(NAME, changed)
    assert texts(Parquet(f"{ROOT}#talks")) == ["five"]  # in the life of a process a branch is asked for once
    a_new_process(monkeypatch)
    new = Parquet(f"{ROOT}#talks")
    assert (texts(old), texts(new)) == (["five"], ["six"])
    assert old.fingerprint() != new.fingerprint()
    assert (revision_of(old.path), revision_of(new.path)) == (first, second)
    pinned = Parquet(f"{ROOT}@{first}#talks")
    assert (pinned.fingerprint(), describe(pinned)) == (old.fingerprint(), describe(old))
    # The same content at another commit is another source too, but is not fetched again.
    third = drawings.commit(NAME, changed | {"README.md": CARD.encode() + b"more"})
    a_new_process(monkeypatch)
    drawings.asked.clear()
    again = Parquet(f"{ROOT}#talks")
    assert revision_of(again.path) == third
    assert again.fingerprint() != new.fingerprint()
    assert not [path for path, _ in drawings.bodies() if "talks/train" in path]


def test_without_the_hub_what_was_fetched_is_read(
    drawings: DataHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert texts(Parquet(f"{ROOT}#talks")) == ["five"]
    a_new_process(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert texts(Parquet(f"{ROOT}#talks")) == ["five"]
    assert "what was fetched of it before is read" in capsys.readouterr().err
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        Parquet(f"{ROOT}#shapes/train")


def test_a_truncated_table_is_named(hub: DataHub, png: Callable[..., bytes]) -> None:
    hub.commit(NAME, {"data/train.parquet": table(png, "one")[:-20]})
    with pytest.raises(ValueError, match=f"{ROOT}@.*/data/train.parquet is no parquet file, or not all of it"):
        Parquet(ROOT)


def test_json_with_pictures_beside_it(hub: DataHub, png: Callable[..., bytes], tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "image": f"images/{n}.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"picture {n}"}]}
        for n in range(3)
    ]  # fmt: skip
    files = {f"images/{n}.png": png(colour=(n, n, n)) for n in range(5)}
    hub.commit(NAME, {"mine.json": json.dumps(rows).encode(), **files})
    source = open_source(f"{ROOT}/mine.json")
    assert isinstance(source, LlavaJson)
    assert source.name == "mine"
    assert [open_image(source.record(n).images[0], source.image_folder).getpixel((0, 0)) for n in range(3)] == [
        (n, n, n) for n in range(3)
    ]
    assert len([path for path, _ in hub.bodies() if path.endswith(".png")]) == 3  # those that rows name
    info = convert(source, tmp_path / "set")
    assert (info.records, info.images, info.bad) == (3, 3, {})
    assert info.provenance.origin == f"{ROOT}@{hub.sha(NAME, 0)}/mine.json"
    assert info.provenance.revision == hub.sha(NAME, 0)
    # Every other reader, of files of the same data set.
    folder = Pictures(f"{ROOT}/images")
    assert len(folder) == 5
    assert origin_of(folder.path) == f"{ROOT}@{hub.sha(NAME, 0)}/images"
    assert place_of(folder.path) == Path("/datasets/lab/drawings/images")
    (default,) = as_sources(DataPath(ROOT), "data.train")
    assert isinstance(default, LlavaJson)
    assert len(default) == 3


def test_captions_texts_tars_and_converted_sets(
    hub: DataHub, png: Callable[..., bytes], tmp_path: Path, make_tar: Callable[[dict[str, bytes]], bytes]
) -> None:
    (tmp_path / "local").mkdir()
    for n in range(3):
        (tmp_path / "local" / f"{n}.png").write_bytes(png(colour=(n, 0, 0)))
        (tmp_path / "local" / f"{n}.txt").write_text(f"caption {n}")
    convert(Captions(str(tmp_path / "local")), tmp_path / "set")
    made = {f"set/{file.relative_to(tmp_path / 'set')}": file.read_bytes()
            for file in (tmp_path / "set").rglob("*") if file.is_file()}  # fmt: skip
    hub.commit(
        NAME,
        {
            **{f"folder/{file.name}": file.read_bytes() for file in (tmp_path / "local").iterdir()},
            "table.csv": b"image,caption\nfolder/1.png,one\n",
            "text.jsonl": b'{"text": "alone"}\n',
            "tars/0.tar": make_tar({"a.png": png(), "a.txt": b"in a tar"}),
            **made,
        },
    )
    assert texts(open_source(f"{ROOT}/folder")) == ["caption 0", "caption 1", "caption 2"]  # type: ignore[arg-type]
    captions = open_source(f"{ROOT}/table.csv")
    assert open_image(captions.record(0).images[0], captions.image_folder).getpixel((0, 0)) == (1, 0, 0)
    assert isinstance(open_source(f"{ROOT}/text.jsonl"), Texts)
    assert texts(open_source(f"{ROOT}/tars")) == ["in a tar"]  # type: ignore[arg-type]
    assert recognise_address(f"{ROOT}/tars/0.tar") == "WebDataset"
    (converted,) = as_sources({"mine": DataPath(f"{ROOT}/set")}, "data.train")
    assert isinstance(converted, Converted)
    assert [converted.record(n).messages[-1].text for n in range(3)] == ["caption 0", "caption 1", "caption 2"]
    assert f"{ROOT}@" in describe(converted)
