"""Conversion of every form, from small real files; what is bad is left out, listed and counted; a stop is taken up."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lit_vlm.commands.cli import main
from lit_vlm.data.records import Image, Record, RecordError, Text, open_image
from lit_vlm.data.sets.check import check_set
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.engine import Local
from lit_vlm.data.sets.forms import open_source, recognise
from lit_vlm.data.sources import Converted, LlavaJson, Source
from tests.data.made import Count

SIZE = (20, 12)


def picture(index: int = 0, size: tuple[int, int] = SIZE, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (10 * index % 255, 80, 200)).save(buffer, form, **options)
    return buffer.getvalue()


def write_llava(folder: Path) -> Path:
    (folder / "images").mkdir()
    entries = []
    for index in range(6):
        (folder / "images" / f"{index}.jpg").write_bytes(picture(index))
        turns = [{"from": "human", "value": f"<image>\nWhat {index}?"}, {"from": "gpt", "value": f"answer {index}"}]
        entries.append({"id": f"l{index}", "image": f"images/{index}.jpg", "conversations": turns})
    entries.append({"id": "text", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]})
    (folder / "mix.json").write_text(json.dumps(entries))
    return folder / "mix.json"


def write_chat(folder: Path) -> Path:
    lines = []
    for index in range(6):
        (folder / f"{index}.png").write_bytes(picture(index, form="PNG"))
        content = [{"type": "image", "image": f"{index}.png"}, {"type": "text", "text": "?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": f"answer {index}"}]
        lines.append(json.dumps({"id": index, "messages": turns, "options": ["a", f"answer {index}"]}))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return folder / "chat.jsonl"


def write_parquet(folder: Path) -> Path:
    rows = []
    for index in range(6):
        image = {"bytes": picture(index), "path": None}
        question = {"question": f"Where {index}?", "choices": ["x", "y"], "answer": "(B)"}
        rows.append({"idx": index, "image": image, **question})
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet", row_group_size=4)
    return folder / "test.parquet"


def write_tar(folder: Path) -> Path:
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard:05d}.tar", "w") as tar:
            for index in range(3):
                name = f"{shard}{index}"
                add(tar, f"{name}.jpg", picture(index))
                add(tar, f"{name}.txt" if shard else f"{name}.json", b"a cat" if shard else b'{"caption": "a cat"}')
    return folder / "shards"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_mmc4(folder: Path) -> Path:
    (folder / "7.jpg").write_bytes(picture(7))
    first = {"image_name": "7.jpg", "matched_text_index": 1}
    second = {"image_base64": base64.b64encode(picture(1)).decode(), "matched_text_index": 0}
    lines = [{"text_list": ["One.", "Two.", "Three."], "image_info": [first, second]}] * 6
    (folder / "docs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "docs.jsonl"


def write_flan(folder: Path) -> Path:
    lines = [json.dumps({"inputs": f"{i} + 1?", "targets": str(i + 1)}) for i in range(5)]
    (folder / "flan.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": "A document."})]))
    return folder / "flan.jsonl"


def write_texts(folder: Path) -> Path:
    (folder / "texts.txt").write_text("".join(f"line {i}\n" for i in range(6)))
    return folder / "texts.txt"


def write_csv(folder: Path) -> Path:
    for index in range(6):
        (folder / f"{index}.webp").write_bytes(picture(index, form="WEBP"))
    rows = "".join(f"{i}.webp,caption {i}\n" for i in range(6))
    (folder / "captions.csv").write_text("image,caption\n" + rows)
    return folder / "captions.csv"


def write_folder(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    for index in range(6):
        (folder / "pictures" / f"{index}.gif").write_bytes(picture(index, form="GIF"))
        (folder / "pictures" / f"{index}.txt").write_text(f"caption {index}")
    return folder / "pictures"


def write_unpaired(folder: Path) -> Path:
    (folder / "pictures" / "deep").mkdir(parents=True)
    for index in range(6):
        (folder / "pictures" / "deep" / f"{index}.png").write_bytes(picture(index, form="PNG"))
    return folder / "pictures"


FORMS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava": ("LlavaJson", write_llava),
    "chat": ("ChatJsonl", write_chat),
    "parquet": ("Parquet", write_parquet),
    "tars": ("WebDataset", write_tar),
    "mmc4": ("Mmc4", write_mmc4),
    "flan": ("Texts", write_flan),
    "texts": ("Texts", write_texts),
    "csv": ("Captions", write_csv),
    "folder": ("Captions", write_folder),
    "unpaired": ("Pictures", write_unpaired),
}


def same(a: Record, b: Record, folder: Path) -> bool:
    """The same content; a converted image is the bytes of the file."""

    def content(record: Record) -> list[Any]:
        parts = [part for message in record.messages for part in (message.role, *message.content)]
        return [
            (part.data if part.data is not None else (folder / str(part.path)).read_bytes())
            if isinstance(part, Image)
            else part
            for part in parts
        ]

    return (a.id, a.options, content(a)) == (b.id, b.options, content(b))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_recognised_and_survives_conversion(name: str, tmp_path: Path) -> None:
    form, write = FORMS[name]
    path = write(tmp_path)
    assert recognise(path) == form
    source = open_source(str(path))
    info = convert(source, tmp_path / "out", Local(2 if name == "llava" else 0))
    converted = Converted(str(tmp_path / "out"), name=source.name)
    assert len(converted) == len(source) == info.records
    for index in range(len(source)):
        record = source.record(index)
        assert same(converted.record(index), record, source.image_folder)
        outline = converted.outline(index)
        assert [image.size for image in outline.images] == [SIZE] * len(record.images)
        assert all(image.data is None for image in outline.images)
    assert check_set(str(tmp_path / "out"), decode=True) == []


def test_an_mmc4_image_stands_before_its_sentence(tmp_path: Path) -> None:
    content = open_source(str(write_mmc4(tmp_path))).record(0).messages[0].content
    assert [part.text if isinstance(part, Text) else "image" for part in content] == [
        "image",
        "One.",
        "image",
        "Two. Three.",
    ]


def test_an_answer_letter_means_its_choice(tmp_path: Path) -> None:
    record = open_source(str(write_parquet(tmp_path))).record(5)
    assert (record.id, record.messages[-1].text, record.options) == ("5", "y", ("x", "y"))


def test_parquet_takes_chat_llava_and_captions(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>see"}, {"role": "assistant", "content": "yes"}]
    rows: list[dict[str, Any]] = [{"messages": turns, "images": [picture()]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chat.parquet")
    record = open_source(str(tmp_path / "chat.parquet")).record(0)
    assert [type(part).__name__ for part in record.messages[0].content] == ["Image", "Text"]
    turns = [{"from": "human", "value": "see <image>"}, {"from": "gpt", "value": "yes"}]
    pq.write_table(pa.Table.from_pylist([{"conversations": turns, "image": picture()}]), tmp_path / "llava.parquet")
    record = open_source(str(tmp_path / "llava.parquet")).record(0)
    assert [type(part).__name__ for part in record.messages[0].content] == ["Text", "Image"]
    pq.write_table(pa.Table.from_pylist([{"caption": "a cat", "image": picture()}]), tmp_path / "captions.parquet")
    assert open_source(str(tmp_path / "captions.parquet")).record(0).messages[1].text == "a cat"


# ----- bad input -----


def bad_image(kind: str, folder: Path) -> str:
    """Write a picture of a kind; returns its path in the folder."""
    file = folder / f"{kind}.img"
    if kind == "truncated":
        file.write_bytes(picture(form="PNG")[:-30])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "html":
        file.write_bytes(b"<html>404</html>")
    elif kind == "one_pixel":
        file.write_bytes(picture(size=(1, 1), form="PNG"))
    elif kind == "huge":
        content = bytearray(picture(form="PNG"))
        content[16:24] = struct.pack(">II", 30_000, 30_000)  # the header says so; what follows need not be there
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        file.write_bytes(content)
    elif kind == "link":
        (folder.parent / "secret.png").write_bytes(picture(form="PNG"))
        file.symlink_to(folder.parent / "secret.png")
    elif kind == "outside":
        (folder.parent / "other.png").write_bytes(picture(form="PNG"))
        return "../other.png"
    return file.name


BAD = {
    "truncated": "corrupt_image",
    "empty": "corrupt_image",
    "html": "corrupt_image",
    "one_pixel": "too_small",
    "huge": "too_large",
    "link": "outside_folder",
    "outside": "outside_folder",
    "missing": "missing_image",
}


def good_image(kind: str) -> tuple[bytes, tuple[int, int]]:
    """Pictures of odd but usable kinds, and their upright size."""
    buffer = io.BytesIO()
    if kind == "animated":
        frames = [PILImage.new("RGB", SIZE, colour) for colour in ("red", "blue")]
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    elif kind == "cmyk":
        PILImage.new("CMYK", SIZE, (0, 255, 255, 0)).save(buffer, "JPEG")
    elif kind == "sixteen_bit":
        PILImage.new("I;16", SIZE, 30_000).save(buffer, "PNG")
    elif kind == "palette_alpha":
        PILImage.new("RGBA", SIZE, (0, 0, 0, 0)).quantize().save(buffer, "PNG", transparency=0)
    elif kind == "rotated":
        exif = PILImage.Exif()
        exif[0x0112] = 6
        PILImage.new("RGB", (12, 20)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue(), SIZE


GOOD = ["animated", "cmyk", "sixteen_bit", "palette_alpha", "rotated"]


def test_every_kind_of_bad_image_has_its_outcome(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for kind in GOOD:
        (folder / f"{kind}.img").write_bytes(good_image(kind)[0])
    entries = []
    for kind in [*GOOD, *BAD]:
        path = f"{kind}.img" if kind in GOOD else bad_image(kind, folder)
        turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]
        entries.append({"id": kind, "image": path, "conversations": turns})
    entries += [
        {"id": "marks", "image": [], "conversations": [{"from": "human", "value": "<image>"}]},
        {"id": "role", "conversations": [{"from": "robot", "value": "x"}]},
        {"id": "turns", "conversations": "x"},
        "no object",
    ]
    (folder / "mix.json").write_text(json.dumps(entries))
    source = LlavaJson(str(folder / "mix.json"))
    with pytest.raises(TooManyBad, match=r"12 of 17 records cannot be used .*outside_folder 2.*--max-bad-share 0\.05"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "lit_vlm.json").exists()
    info = convert(source, tmp_path / "out", max_bad_share=0.9)
    converted = Converted(str(tmp_path / "out"))
    assert [converted.record(i).id for i in range(len(converted))] == GOOD
    assert [converted.record(i).images[0].size for i in range(len(converted))] == [good_image(kind)[1] for kind in GOOD]
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in listed}
    # What cannot be parsed is named by its place in the file.
    malformed = {"13": "image_count", "14": "unknown_role", "15": "malformed", "16": "malformed"}
    assert reasons == BAD | malformed
    assert info.bad["corrupt_image"] == 3
    assert sum(info.bad.values()) == 12
    assert all(line["detail"] and line["source"] == "mix" for line in listed)


def test_a_tar_with_links_holes_and_an_early_end(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "0.txt", b"linked")
        add(tar, "1.json", b'{"status": "failed_to_download"}')
        add(tar, "2.jpg", picture())
        add(tar, "3.jpg", picture())
        add(tar, "3.txt", b"a cat")
        add(tar, "4.jpg", picture(size=(90, 90)))
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"4.jpg") + 600])
    source = open_source(str(tmp_path / "a.tar"))
    info = convert(source, tmp_path / "out", max_bad_share=0.9)
    assert info.records == 1
    assert Converted(str(tmp_path / "out")).record(0).id == "3"
    assert info.bad["outside_folder"] == info.bad["missing_image"] == 1
    assert info.bad["malformed"] == 1  # 2 has no caption
    assert info.bad["truncated_file"] >= 1


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.json"])
def test_a_file_of_another_kind_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match=str(tmp_path / name)):
        open_source(str(tmp_path / name))


def test_unknown_forms_and_arguments_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"foo": 1}')
    with pytest.raises(ValueError, match=r"keys \['foo'\] is not known"):
        open_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match=r"ending '.xyz' is not known"):
        open_source(str(tmp_path / "a.xyz"))
    with pytest.raises(ValueError, match="sauce"):
        open_source(str(write_flan(tmp_path)), settings=["sauce=1"])


# ----- resuming, checking -----


def test_a_killed_conversion_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lit_vlm.data.sets.convert import convert\n"
        "from tests.data.made import Count\n"
        "source = Count('n', 400)\n"
        "source._on_record = lambda index: time.sleep(0.01)\n"
        "convert(source, Path(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], cwd=root, env=os.environ)
    parts = tmp_path / "out" / "parts"
    deadline = time.monotonic() + 120
    while not (parts / "000000" / "part.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    # The last part may be half written; finished ones are kept.
    before = {file: file.stat().st_mtime_ns for file in parts.glob("*/part.json")}
    assert before
    assert not (tmp_path / "out" / "lit_vlm.json").exists()
    seen: list[int] = []

    watched = Count("n", 400)
    watched._on_record = seen.append
    info = convert(watched, tmp_path / "out")
    assert len(seen) < 400
    assert info.fingerprint == convert(Count("n", 400), tmp_path / "whole").fingerprint
    assert check_set(str(tmp_path / "out"), decode=False) == []


def test_another_source_is_not_mixed_into_an_unfinished_conversion(tmp_path: Path) -> None:
    def stop(index: int) -> None:
        if index == 300:
            raise KeyboardInterrupt

    stopped = Count("n", 400)
    stopped._on_record = stop
    with pytest.raises(KeyboardInterrupt):
        convert(stopped, tmp_path / "out")
    with pytest.raises(ValueError, match=r"unfinished work on something else \(.*records 400 → 300"):
        convert(Count("n", 300), tmp_path / "out")
    convert(Count("n", 400), tmp_path / "out")
    with pytest.raises(ValueError, match=r"the result of something else \(.*records 400 → 300"):
        convert(Count("n", 300), tmp_path / "out")
    (tmp_path / "file").write_text("something")
    with pytest.raises(ValueError, match="file is a file: name a folder"):
        convert(Count("n", 300), tmp_path / "file")
    (tmp_path / "out" / "plan.json").unlink()  # as earlier versions left a set
    with pytest.raises(ValueError, match="is not empty"):
        convert(Count("n", 400), tmp_path / "out")


def test_the_same_command_leaves_a_finished_set_alone(tmp_path: Path) -> None:
    info = convert(Count("n", 400), tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    again = Count("n", 400)
    again._on_record = pytest.fail  # type: ignore[assignment]
    assert convert(again, tmp_path / "out") == info
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    convert(open_source(str(write_llava(tmp_path))), tmp_path / "out")
    chunk = tmp_path / "out" / "chunk-000000.bin"
    content = bytearray(chunk.read_bytes())
    place = content.rindex(b"answer 4")
    content[place : place + 8] = b"ANSWER 4"
    chunk.write_bytes(content)
    assert check_set(str(tmp_path / "out"), decode=False) == ["record 4: differs from its entry in records/"]
    other = tmp_path / "out" / "records" / chunk.name
    other.write_bytes(other.read_bytes().replace(b"answer 4", b"ANSWER 4"))
    assert ["content has changed" in problem for problem in check_set(str(tmp_path / "out"), decode=False)] == [True]
    chunk.unlink()
    assert check_set(str(tmp_path / "out"), decode=False) == [f"{chunk} is missing"]
    with pytest.raises(ValueError, match=r"is no converted set: it has no lit_vlm\.json"):
        check_set(str(tmp_path), decode=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text[:40], r"lit_vlm\.json is damaged \("),
        (lambda text: "[]", r"lit_vlm\.json is damaged: it holds a list"),
        (
            lambda text: text.replace('"version": 1', '"version": 7'),
            r"lit_vlm\.json is of format 7; this lit-vlm reads format 1",
        ),
        (lambda text: text.replace('"records": 7', '"records": "7"'), r"lit_vlm\.json is damaged: records: "),
        (lambda text: text.replace('"records"', '"recordings"'), r"lit_vlm\.json is damaged: records: Field required"),
    ],
)
def test_a_damaged_description_is_named(change: Callable[[str], str], expected: str, tmp_path: Path) -> None:
    convert(open_source(str(write_llava(tmp_path))), tmp_path / "out")
    info = tmp_path / "out" / "lit_vlm.json"
    text = info.read_text()
    info.write_text(change(text))
    assert info.read_text() != text
    with pytest.raises(ValueError, match=expected):
        Converted(str(tmp_path / "out"))


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    convert(open_source(str(write_llava(tmp_path))), tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    index.write_text(index.read_text()[:30])
    (problem,) = check_set(str(tmp_path / "out"), decode=False)
    assert problem.startswith(f"{index} is damaged (")


def test_a_set_in_object_storage_reads_as_the_one_on_disk(tmp_path: Path) -> None:
    convert(open_source(str(write_llava(tmp_path))), tmp_path / "out")
    near, far = Converted(str(tmp_path / "out")), Converted(f"local:{tmp_path / 'out'}")
    assert far.chunked
    assert far.fingerprint() == near.fingerprint()
    for index in (6, 0, 3, 3, 5):
        assert far.record(index) == near.record(index)
        assert far.outline(index) == near.outline(index)


def test_the_commands_convert_check_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_llava(tmp_path)
    main(["data", "convert", str(path), str(tmp_path / "out"), "--workers", "0", "--set", "image_position=in_place"])
    main(["data", "check", str(tmp_path / "out"), "--workers", "0", "--decode"])
    main(["data", "stats", str(tmp_path / "out"), "--workers", "0"])
    shown = capsys.readouterr().out
    assert "out is whole" in shown.replace("\n", "")
    assert "image width (px)" in shown
    with PILImage.open(tmp_path / "out" / "stats.png") as drawn:
        assert drawn.width > 400


def test_a_conversion_without_images_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns, "images": []}))
    main(["data", "convert", str(tmp_path / "chat.jsonl"), str(tmp_path / "out"), "--workers", "0"])
    assert "none of the 1 records has an image" in capsys.readouterr().out
    main(["data", "convert", str(write_flan(tmp_path)), str(tmp_path / "texts"), "--workers", "0"])
    assert "has an image" not in capsys.readouterr().out


def test_tokens_are_counted_on_request(tmp_path: Path) -> None:
    tokenizer = str(Path(__file__).parents[2] / "fixtures" / "tiny_llama")
    source: Source = open_source(str(write_flan(tmp_path)))
    info = convert(source, tmp_path / "out", tokenizer=tokenizer)
    assert info.tokens["sum"] > info.words["sum"] > 0
    assert info.tokens["tokenizer"] == tokenizer


# ----- what an attack on the readers found -----


def test_a_reader_with_other_settings_does_not_go_on(tmp_path: Path) -> None:
    path = write_llava(tmp_path)
    wrong = open_source(str(path), settings=["image_folder=/nowhere"])
    with pytest.raises(TooManyBad, match="6 of 7"):
        convert(wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="reader"):
        convert(open_source(str(path)), tmp_path / "out")


def test_a_set_is_not_written_into_its_source(tmp_path: Path) -> None:
    source = open_source(str(write_unpaired(tmp_path)))
    with pytest.raises(ValueError, match="lies inside the source"):
        convert(source, tmp_path / "pictures" / "out")


def tar_of(path: Path, *names: str) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name, picture() if name.lower().endswith(("jpg", "png")) else name.encode())
    return path.read_bytes()


def test_no_member_of_a_tar_is_lost_without_a_word(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", "a/1.jpg", "a/1.txt", "b/1.JPG", "b/1.txt", "1.5.jpg", "1.5.txt")
    source = open_source(str(tmp_path / "a.tar"))
    assert [source.record(i).id for i in range(len(source))] == ["a/1", "b/1", "1.5"]
    tar_of(tmp_path / "b.tar", "1.jpg", "1.txt", "1.jpg", "1.txt")
    with pytest.raises(TooManyBad, match="malformed 1"):
        convert(open_source(str(tmp_path / "b.tar")), tmp_path / "b")


@pytest.mark.parametrize("kind", ["damaged header", "cut at a member", "two in one"])
def test_a_tar_that_cannot_be_read_to_its_end_says_so(kind: str, tmp_path: Path) -> None:
    content = bytearray(tar_of(tmp_path / "a.tar", "1.jpg", "1.txt", "2.jpg", "2.txt"))
    if kind == "damaged header":
        content[content.index(b"2.jpg") + 3] ^= 1
    elif kind == "cut at a member":
        content = content[: content.index(b"2.jpg")]
    else:
        content += tar_of(tmp_path / "b.tar", "3.jpg", "3.txt")
    (tmp_path / "a.tar").write_bytes(content)
    info = convert(open_source(str(tmp_path / "a.tar")), tmp_path / "out", max_bad_share=0.9)
    assert info.records == (2 if kind == "two in one" else 1)
    assert info.bad == {"truncated_file": 1}


def test_an_unclosed_quote_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('image,caption\na.png,one\nb.png,"two\nc.png,three\n')
    with pytest.raises(ValueError, match=r"a\.csv, line \d"):
        open_source(str(tmp_path / "a.csv"))


def test_parquet_keeps_options_and_misses_images(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "b"}]
    row: dict[str, Any] = {"messages": turns, "image": picture(), "images": [], "options": ["a", "b"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    record = open_source(str(tmp_path / "a.parquet")).record(0)
    assert record.options == ("a", "b")
    assert len(record.images) == 1
    rows = [{"caption": "x", "image": None}, {"caption": "y", "image": picture()}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    with pytest.raises(RecordError, match="missing_image"):
        open_source(str(tmp_path / "b.parquet")).record(0)
    pq.write_table(pa.Table.from_pylist([{"text": "a page"}]), tmp_path / "c.parquet")
    assert open_source(str(tmp_path / "c.parquet")).record(0).messages[0].role == "document"


def test_half_a_character_is_a_malformed_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "cut \\ud83d"}\n')
    info = convert(open_source(str(tmp_path / "a.jsonl")), tmp_path / "out", max_bad_share=0.9)
    assert (info.records, info.bad) == (1, {"malformed": 1})


def test_odd_exif_tags_do_no_harm(tmp_path: Path) -> None:
    tags = ImageFileDirectory_v2()
    tags[0x0112], tags[0x011A] = 6, "seventy-two"
    tags.tagtype[0x011A] = 2  # a resolution as text
    buffer = io.BytesIO()
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + tags.tobytes(8)
    PILImage.new("RGB", (12, 20)).save(buffer, "JPEG", exif=exif)
    assert open_image(Image(data=buffer.getvalue()), tmp_path).size == (20, 12)


def test_shards_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    source = str(write_llava(tmp_path))
    command = ["data", "convert", source, str(tmp_path / "small"), "--workers", "0", "--shard-size"]
    main([*command, "2KiB"])
    info = convert(LlavaJson(source), tmp_path / "usual")
    small, usual = Converted(str(tmp_path / "small")), Converted(str(tmp_path / "usual"))
    shards = json.loads((tmp_path / "small" / "index.json").read_text())["chunks"]
    assert len(shards) > len(usual.info.chunks) == 1
    largest = max(len(b"".join(small.item(index).values())) for index in range(7))
    assert all(abs(shard["chunk_bytes"] - 2048) < largest for shard in shards[:-1])
    assert small.fingerprint() == info.fingerprint  # of the records, however they are cut
    assert check_set(str(tmp_path / "small"), decode=True) == []
    assert [small.item(index) for index in range(7)] == [usual.item(index) for index in range(7)]
    with pytest.raises(IndexError, match="7 of 7 items"):
        small.item(7)
    with pytest.raises(ValueError, match="the result of something else .shard_bytes None → 4096"):
        convert(LlavaJson(source), tmp_path / "usual", shard_bytes=4096)
    with pytest.raises(ValueError, match="something else .shard_bytes 2048 → None"):
        convert(LlavaJson(source), tmp_path / "small")
    with pytest.raises(ValueError, match="a shard has 1 to 2,147,483,648 bytes"):
        convert(LlavaJson(source), tmp_path / "huge", shard_bytes=1 << 33)


@pytest.mark.parametrize(("limits", "match"), [
    ({"max_bad_share": 2}, "--max-bad-share must be from 0 to 1, not 2"),
    ({"min_side": 0}, "--min-side must be at least 1, not 0"),
])  # fmt: skip
def test_limits_that_mean_nothing_are_refused(limits: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        convert(Count("n", 3), tmp_path / "out", **limits)
    assert not (tmp_path / "out").exists()
