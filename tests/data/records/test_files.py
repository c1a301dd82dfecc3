"""Which files of a folder are data: none that a system or an editor left there, and links only where they may be."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_vlm.data.records import RecordError, open_image
from lit_vlm.data.records.files import is_hidden, list_files
from lit_vlm.data.sets.check import check_set
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.forms import open_source, recognise
from lit_vlm.data.sources import Captions, ChatJsonl, LlavaJson, Mmc4, Parquet, Pictures, Source, Texts, WebDataset

ROWS: dict[str, tuple[type[Source], Any]] = {
    "chat": (ChatJsonl, {"messages": [{"role": "user", "content": "q"}]}),
    "llava": (LlavaJson, {"conversations": [{"from": "human", "value": "q"}]}),
    "texts": (Texts, {"text": "a"}),
    "mmc4": (Mmc4, {"text_list": ["a"], "image_info": []}),
}
LEFT = (".ipynb_checkpoints/a-checkpoint", "._a", ".hidden/deep/a", "__MACOSX/a", "__MACOSX/._a", "sub/.a")


def write(folder: Path, names: tuple[str, ...], suffix: str, content: bytes) -> None:
    for name in names:
        file = folder / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "Thumbs.db").write_bytes(b"\0")


@pytest.mark.parametrize("below", ["data", ".cache/hub/data"])
@pytest.mark.parametrize("name", ROWS)
def test_hidden_files_of_rows_are_no_data(name: str, below: str, tmp_path: Path) -> None:
    form, row = ROWS[name]
    write(tmp_path / below, ("a", "sub/b", *LEFT), ".jsonl", json.dumps(row).encode())
    assert recognise(tmp_path / below) == form.__name__
    assert len(open_source(str(tmp_path / below))) == 2


def test_hidden_pictures_and_captions_are_no_data(tmp_path: Path, png: Callable[..., bytes]) -> None:
    write(tmp_path, ("a", "sub/b", *LEFT), ".png", png())
    assert recognise(tmp_path) == "Pictures"
    assert [Pictures(str(tmp_path)).record(i).id for i in range(2)] == ["a.png", "sub/b.png"]
    write(tmp_path, ("a", "sub/b", *LEFT), ".txt", b"a cat")
    source = open_source(str(tmp_path))
    assert isinstance(source, Captions)
    assert len(source) == 2


def test_hidden_tables_and_tars_are_no_data(tmp_path: Path, png: Callable[..., bytes]) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "a"}]), tmp_path / "t.parquet")
    write(tmp_path / "tables", ("a", *LEFT), ".parquet", (tmp_path / "t.parquet").read_bytes())
    assert len(Parquet(str(tmp_path / "tables"))) == 1
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("./1.png", "1.txt", "._1.png", "__MACOSX/1.png", ".ipynb_checkpoints/2.png"):
            content = b"a cat" if name.endswith("txt") else png()
            info = tarfile.TarInfo(name.removeprefix("./"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    write(tmp_path / "tars", ("a", *LEFT), ".tar", (tmp_path / "t.tar").read_bytes())
    source = WebDataset(str(tmp_path / "tars"))
    assert [source.record(i).id for i in range(len(source))] == ["1"]


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / ".mine.jsonl").write_text('{"text": "a"}')
    assert len(Texts(str(tmp_path / ".mine.jsonl"))) == 1


@pytest.mark.parametrize(
    ("path", "hidden"), [("./a/b.png", False), ("a.b/c", False), ("a/.b/c", True), ("a/Thumbs.db", True), ("..a", True)]
)
def test_parts_of_a_path_decide(path: str, hidden: bool) -> None:
    assert is_hidden(PurePosixPath(path)) == hidden


# ----- links -----


@pytest.fixture
def linked(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    """LLaVA's layout: `coco` is a link to a disk, and there is one to a picture of it."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(png(6, 5))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "coco").symlink_to(tmp_path / "disk")
    (folder / "b.png").symlink_to(tmp_path / "disk" / "a.png")
    return folder


def sources(folder: Path, path: str, **options: Any) -> list[Source]:
    """Every source with image paths, on one picture."""
    question = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    rows: dict[str, Any] = {
        "llava.jsonl": {"image": path, "conversations": question},
        "chat.jsonl": {"images": [path], "messages": [{"role": "user", "content": "<image>q"}]},
        "part.jsonl": {"messages": [{"role": "user", "content": [{"type": "image", "image": path}]}]},
        "mmc4.jsonl": {"text_list": ["a"], "image_info": [{"image_name": path, "matched_text_index": 0}]},
        "captions.jsonl": {"image": path, "caption": "a"},
    }
    for name, row in rows.items():
        (folder / name).write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([{"image": path, "caption": "a"}]), folder / "table.parquet")
    (folder / "table.csv").write_text(f"image,caption\n{path},a\n")
    classes = (LlavaJson, ChatJsonl, ChatJsonl, Mmc4, Captions, Parquet, Captions)
    return [form(str(folder / name), **options) for form, name in zip(classes, (*rows, "table.parquet", "table.csv"))]  # noqa: B905


@pytest.mark.parametrize("path", ["coco/a.png", "b.png"])
def test_every_source_with_paths_reads_links_on_request(path: str, linked: Path) -> None:
    for source in sources(linked, path):
        with pytest.raises(RecordError, match=r"outside_folder.*--set allow_links=true"):
            open_image(source.record(0).images[0], source.image_folder)
    for source in sources(linked, path, allow_links=True):
        assert open_image(source.record(0).images[0], source.image_folder).size == (6, 5)
    for source in sources(linked, "../disk/a.png", allow_links=True):
        with pytest.raises(RecordError, match="outside_folder"):
            open_image(source.record(0).images[0], source.image_folder)


@pytest.mark.parametrize("form", [Pictures, Captions])
def test_a_folder_behind_a_link_is_named_or_read(form: Any, linked: Path) -> None:
    (linked.parent / "disk" / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"has files behind a link to another folder, as .*coco/a\.png.*allow_links"):
        form(str(linked))
    source = form(str(linked), allow_links=True)
    assert len(source) == 2
    assert open_image(source.record(1).images[0], source.image_folder).size == (6, 5)


def test_links_in_a_circle_and_into_the_folder_are_walked_once(linked: Path) -> None:
    (linked / "again").symlink_to(linked)
    (linked.parent / "disk" / "back").symlink_to(linked)
    (linked / "coco2").symlink_to(linked.parent / "disk")
    found = list_files(linked, [".png"], links=True)
    assert len(found) == 2
    (linked / "other").symlink_to(linked.parent / "nowhere")
    assert len(list_files(linked, [".png"], links=True)) == 2


def test_folders_that_links_give_twice_are_walked_once(linked: Path) -> None:
    (linked.parent / "disk" / "deep").mkdir()
    (linked.parent / "disk" / "deep" / "c.png").write_bytes(b"")
    (linked / "also").symlink_to(linked.parent / "disk" / "deep")
    (linked / "up").symlink_to(linked.parent)
    assert sorted(file.name for file in list_files(linked, [".png"], links=True)) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("links", [True, False])
def test_a_link_to_a_hidden_folder_of_the_folder_is_followed(links: bool, linked: Path) -> None:
    (linked / "coco").unlink()
    (linked / ".store" / "deep").mkdir(parents=True)
    (linked / ".store" / "deep" / "c.png").write_bytes(b"")
    (linked / "shown").symlink_to(linked / ".store")
    (linked / "again").symlink_to(linked / ".store" / "deep")
    (linked / ".kept").symlink_to(linked / ".store")
    assert sorted(file.name for file in list_files(linked, [".png"], links)) == ["b.png", "c.png"]


def test_a_set_is_written_beside_what_a_system_left(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"\0")
    assert convert(open_source(str(tmp_path / "a.jsonl")), tmp_path / "out").records == 1
    assert check_set(str(tmp_path / "out"), decode=True) == []
