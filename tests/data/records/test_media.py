"""Pictures that stand beside the text in one of many ways: read, or refused by name; never text alone by accident."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_vlm.data.records import MAX_DETAIL, Image, Message, Record, RecordError, Text, open_image
from lit_vlm.data.records.media import decode_base64, image_of
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.forms import open_source, recognise
from lit_vlm.data.sources import Captions, ChatJsonl, Converted, Grouped, LlavaJson, Mmc4, Source, Texts, Unpaired

LLAVA = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
PLAIN = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CHAT = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
BARE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, CHAT[1]]
NAMED = [
    {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "q"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
]
ASKED = [{"role": "user", "content": "q"}, CHAT[1]]


@pytest.fixture
def folder(tmp_path: Path, png: Callable[..., bytes]) -> Path:
    """A folder with the picture a.png of 8 × 6 pixels."""
    (tmp_path / "a.png").write_bytes(png(8, 6))
    return tmp_path


def source_of(folder: Path, row: Any, name: str = "rows.jsonl") -> Source:
    """A file of one row, read as the kit recognises it."""
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([row]), folder / name)
    else:
        (folder / name).write_text(json.dumps([row] if name.endswith(".json") else row))
    return open_source(str(folder / name))


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def seen(record: Record) -> list[str]:
    return ["image" if isinstance(part, Image) else part.text for m in record.messages for part in m.content]


READ: dict[str, tuple[Any, list[str]]] = {
    "ms-swift": ({"messages": CHAT, "images": ["a.png"]}, ["image", "q", "a"]),
    "LLaMA-Factory": ({"conversations": LLAVA, "images": ["a.png"]}, ["image", "\nq", "a"]),
    "LLaVA": ({"conversations": LLAVA, "image": "a.png"}, ["image", "\nq", "a"]),
    "TRL": ({"messages": BARE, "images": ["a.png"]}, ["image", "q", "a"]),
    "objects": ({"messages": CHAT, "images": [{"path": "a.png"}]}, ["image", "q", "a"]),
    "query": ({"query": "<image>q", "response": "a", "images": "a.png"}, ["image", "q", "a"]),
    "history": (
        {"query": "r", "response": "b", "history": [["<image>q", "a"]], "images": ["a.png"], "system": "s"},
        ["s", "image", "q", "a", "r", "b"],
    ),
    "the_cauldron": (
        {"texts": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}], "images": ["a.png"]},
        ["image", "\nq", "a", "r", "b"],
    ),
    "the_cauldron with marks": (
        {"texts": [{"user": "q", "assistant": "a"}, {"user": "<image>r", "assistant": "b"}], "images": ["a.png"]},
        ["q", "a", "image", "r", "b"],
    ),
    "captions": ({"image": "a.png", "caption": "a"}, ["image", "\nDescribe the image.", "a"]),
    "null media": ({"messages": ASKED, "images": None, "videos": [], "audio": ""}, ["q", "a"]),
    "missing number": ({"conversations": PLAIN, "image": float("nan")}, ["q", "a"]),
}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("form", READ)
def test_known_conventions_are_read(form: str, name: str, folder: Path) -> None:
    row, expected = READ[form]
    source = source_of(folder, row, name)
    record = source.record(0)
    assert seen(record) == expected
    assert [open_image(image, source.image_folder).size for image in record.images] == [(8, 6)] * expected.count(
        "image"
    )


def test_parts_with_addresses_are_read(folder: Path) -> None:
    content = uri((folder / "a.png").read_bytes())
    forms: list[Any] = [
        {"type": "image_url", "image_url": {"url": content}},
        {"type": "image_url", "image_url": content},
        {"type": "image", "image": content},
        {"type": "image", "image": f"file://{folder}/a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "image": None, "path": "a.png"},
    ]
    source = source_of(folder, {"messages": [{"role": "user", "content": [*forms, {"type": "text", "text": "q"}]}]})
    assert [open_image(image, folder).size for image in source.record(0).images] == [(8, 6)] * len(forms)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://a.b/c.png", "remote_image.*'image' is 'https://a.b/c.png': pictures are not fetched"),
        ("s3://bucket/c.png", "remote_image"),
        ("file://host/c.png", "malformed.*three slashes"),
        ("data:image/png;base64,@@@@", "corrupt_image.*is not base64"),
        ("data:image/png", "corrupt_image.*without content"),
        (["a.png", None], "malformed: 'image' is 'None'; expected a path"),
        ({"<image_00>": "a.png"}, "malformed.*expected a path"),
    ],
)
def test_an_address_that_cannot_be_read_is_named(address: Any, reason: str, folder: Path) -> None:
    with pytest.raises(RecordError, match=reason):
        source_of(folder, {"conversations": LLAVA, "image": address}).record(0)


def test_a_plain_data_uri_is_decoded() -> None:
    assert image_of("data:,a%20b", "'image'").data == b"a b"
    assert decode_base64("YSBi", "'image'") == b"a b"


ROW = {"messages": ASKED}
REFUSED: dict[str, tuple[Any, str]] = {
    "marks without pictures": ({"messages": CHAT}, "image_count"),
    "pictures without marks": ({"messages": ASKED, "images": ["a.png"]}, "image_count"),
    "LLaVA without mark": ({"conversations": PLAIN, "images": ["a.png"]}, "image_count.*image_position: spaced"),
    "query without mark": ({"query": "q", "response": "a", "images": ["a.png"]}, "image_count"),
    "cauldron with too few": (
        {"texts": [{"user": "<image><image>", "assistant": "a"}], "images": ["a.png"]},
        "image_count: 2",
    ),
    **{
        key: ({**ROW, key: ["a.png"]}, f"unread_media: the record holds .* under '{key}', which is not read: name pic")
        for key in ("image_path", "image_paths", "img", "imgs", "img_path", "image_url", "picture", "photos", "video",
                    "videos", "video_path", "audio", "audios", "audio_path", "image_1", "left_image", "image_base64")
    },
    "LLaVA's video": ({"conversations": PLAIN, "video": "a.mp4"}, "missing_image: .*a.mp4 does not exist"),
    "LLaVA's video and image": ({"conversations": LLAVA, "image": "a.png", "video": "a.mp4"}, "unread_media.*'video'"),
    "LLaVA's other video": (
        {"conversations": PLAIN, "video_path": "a.mp4"},
        "unread_media: entry 0 holds 'a.mp4' under 'video_path'.*videos are read by LlavaVideo",
    ),
    "of a turn": ({"conversations": [{**PLAIN[0], "image": "a.png"}, PLAIN[1]]}, r"unread_media: conversations\[0\]"),
    "of a message": ({"messages": [{**ASKED[0], "images": ["a.png"]}]}, r"unread_media: messages\[0\]"),
    "film part": ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "unread_media"),
    "sound part": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "unread_media"),
    "Qwen-VL": ({"conversations": [{"from": "user", "value": "<img>a.png</img>q"}]}, "unread_media.*write <image>"),
    "text beside a picture": ({"inputs": "q", "targets": "a", "image": "a.png"}, "unread_media.*reads text alone"),
    "text with a mark": ({"text": "see <image>"}, "image_count: 1 <image> marks"),
    "documents": (
        {"text_list": ["a"], "image_info": [], "images": ["a.png"]},
        "unread_media.*MMC4 names pictures in 'image_info'",
    ),
    "remote document": (
        {"text_list": ["a"], "image_info": [{"image_name": "http://a.b/c.png", "matched_text_index": 0}]},
        "remote_image",
    ),
    "caption with a mark": ({"image": "a.png", "caption": "<image> a cat"}, "image_count"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_read_is_refused_by_name(form: str, folder: Path) -> None:
    row, expected = REFUSED[form]
    with pytest.raises(RecordError, match=expected):
        source_of(folder, row).record(0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a", "image_1": b"x"}, "unread_media.*'image_1'"),
        ({"caption": "a", "image_path": "a.png"}, "unread_media.*'image_path'"),
        ({"text": "a", "file_name": "a.png"}, "unread_media.*'file_name'"),
        ({"question": "<image>q<image>", "answer": "a", "image": b"x"}, "image_count: 2 <image> marks"),
        ({"question": "<image>q", "answer": "a"}, "image_count"),
        ({"conversations": PLAIN, "image": b"x"}, "image_count"),
        ({"messages": CHAT, "images": []}, "image_count"),
        ({"texts": ["a", None], "images": [b"x", b"y"]}, r"malformed: texts\[0\]"),
    ],
)
def test_rows_of_tables_are_refused_alike(row: Any, expected: str, folder: Path) -> None:
    with pytest.raises(RecordError, match=expected):
        source_of(folder, row, "rows.parquet").record(0)


def test_tables_are_read_alike(folder: Path) -> None:
    content = (folder / "a.png").read_bytes()
    image = {"bytes": content, "path": None}
    rows: list[tuple[Any, list[str]]] = [
        ({"images": [image], "texts": [{"user": "q", "assistant": "a", "source": "s"}]}, ["image", "\nq", "a"]),
        ({"question": "see <image>?", "answer": "a", "image": image}, ["see ", "image", "?", "a"]),
        ({"question": "q", "answer": "a", "image": image, "image_url": "http://a"}, ["image", "\nq", "a"]),
        ({"question": "q", "answer": "a", "image": {"bytes": None, "path": None}}, ["q", "a"]),
        ({"messages": CHAT, "images": ["a.png"]}, ["image", "q", "a"]),
        ({"messages": NAMED, "images": [image]}, ["image", "q", "a"]),
        ({"messages": NAMED, "images": [{"bytes": None, "path": "a.png"}]}, ["image", "q", "a"]),
    ]
    for row, expected in rows:
        source = source_of(folder, row, "rows.parquet")
        record = source.record(0)
        assert seen(record) == expected
        assert [open_image(one, source.image_folder).size for one in record.images] == [(8, 6)] * expected.count(
            "image"
        )


EVERY_COLUMN = dict.fromkeys(
    ("messages", "texts", "query", "response", "conversations", "question", "answer", "choices", "caption", "text",
     "image", "images", "video", "file_name")
)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": LLAVA, "images": [b"x"]}, ["image", "\nq", "a"]),
        ({"query": "q", "response": "a"}, ["q", "a"]),
        ({"texts": [{"user": "q", "assistant": "a"}]}, ["q", "a"]),
        ({"question": "q", "answer": "a"}, ["q", "a"]),
        ({"question": "q", "answer": "a", "choices": [None]}, ["q", "a"]),
        ({"caption": "a", "image": b"x"}, ["image", "\nDescribe the image.", "a"]),
        ({"caption": "a", "image": b"x", "conversations": [None]}, ["image", "\nDescribe the image.", "a"]),
        ({"caption": "a", "image": b"x", "question": "", "answer": ""}, ["image", "\nDescribe the image.", "a"]),
        ({"text": "a"}, ["a"]),
        ({"text": "a", "caption": ""}, ["a"]),
    ],
)
def test_columns_that_hold_nothing_do_not_decide(row: Any, expected: list[str], folder: Path) -> None:
    assert seen(source_of(folder, {**EVERY_COLUMN, **row}, "rows.parquet").record(0)) == expected


@pytest.mark.parametrize(
    ("part", "images", "expected"),
    [
        ({"type": "image", "path": "a.png"}, [{"bytes": "aGk="}], "hi"),
        ({"type": "image", "image": "x/a.png"}, ["a.png"], "a.png"),
        ({"type": "image", "image": "b.png"}, ["a.png"], "image_count: 0 <image> marks"),
        ({"type": "image", "image": "a.png"}, [{"bytes": "aGk="}, {"bytes": "aGk="}], "image_count"),
        ({"type": "image", "image": "http://a.b/a.png"}, [{"bytes": "aGk="}], "remote_image"),
        ({"type": "image", "image": "data:,a"}, [{"bytes": "aGk="}], "image_count"),
    ],
)
def test_a_part_with_a_mere_name_takes_the_next_picture(part: Any, images: Any, expected: str, folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}], "images": images}
    source = source_of(folder, row)
    if expected.endswith(("hi", "a.png")):
        (image,) = source.record(0).images
        assert (image.path or (image.data or b"").decode()) == expected
        return
    with pytest.raises(RecordError, match=expected):
        source.record(0)


def test_names_and_marks_take_pictures_in_order(folder: Path) -> None:
    content = [{"type": "text", "text": "<image>q"}, {"type": "image", "path": "2.png"}, {"type": "image"}]
    pictures = [{"bytes": base64.b64encode(name).decode()} for name in (b"1", b"2", b"3")]
    source = source_of(folder, {"messages": [{"role": "user", "content": content}], "images": pictures})
    assert [image.data for image in source.record(0).images] == [b"1", b"2", b"3"]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"1.txt": b"<image> a cat"}, "image_count"),
        ({"1.txt": b"a cat", "1.mp4": b"film"}, r"unread_media: 1\.mp4 is a film"),
        ({"1.txt": b"a cat", "1.heic": b"picture"}, r"unread_media: 1\.heic is .* a picture of a kind"),
        ({"1.wav": b"sound", "1.json": b'{"caption": "a cat"}'}, r"unread_media: 1\.wav"),
    ],
)
def test_a_tar_is_refused_alike(members: dict[str, bytes], expected: str, folder: Path) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in {"1.png": (folder / "a.png").read_bytes(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(RecordError, match=expected):
        open_source(str(folder / "a.tar")).record(0)


def test_sources_of_sources_pass_the_refusal_on(folder: Path) -> None:
    texts = source_of(folder, {"text": "a", "image_path": "a.png"})
    assert isinstance(texts, Texts)
    with pytest.raises(RecordError, match="unread_media"):
        Grouped(texts, 1).record(0)
    with pytest.raises(RecordError, match="unread_media"):
        Unpaired(source_of(folder, {"conversations": LLAVA, "image": "a.png"}, "b.jsonl"), texts).record(0)


def test_mmc4_documents_keep_what_a_sentence_says(folder: Path) -> None:
    info = {"image_name": "a.png", "matched_text_index": 0}
    row = {
        "text_list": ["<image> one", "two"],
        "image_info": [info],
        "url": "http://a.b",
        "image_url": "http://a.b/c.png",
    }
    source = source_of(folder, row)
    assert isinstance(source, Mmc4)
    assert seen(source.record(0)) == ["image", "<IMAGE> one two"]


def test_a_set_that_was_converted_with_marks_as_text_is_counted(folder: Path) -> None:
    class Old(Source):
        """As earlier versions read such rows."""

        name, image_folder = "old", Path()

        def __len__(self) -> int:
            return 1

        def record(self, index: int) -> Record:
            return Record("0", "old", (Message("user", (Text("<image>q"),)), Message("assistant", (Text("a"),))))

        def fingerprint(self) -> str:
            return "old"

    convert(Old(), folder / "set")
    with pytest.raises(RecordError, match="image_count"):
        Converted(str(folder / "set")).record(0)


# ----- keys that are called like pictures and hold none -----

WORDS = {"has_images": "no", "text_image": "no", "media": "BBC", "image_file": "none", "videos": ["n/a", "no"]}
CLAIMED = {
    "photo_url": "http://a.b/c",
    "image_path": "coco/000001",
    "image_file": "000001.JPG",
    "image_data": "aGkh" * 30,
    "media": [{"type": "image", "data": "aGkh" * 30}],
    "img": {"path": "none"},
    "picture": {"bytes": "aGk="},
}
FORMS: dict[str, tuple[Any, str, list[str]]] = {
    "chat": ({"messages": ASKED}, "rows.jsonl", ["q", "a"]),
    "LLaVA": ({"conversations": PLAIN}, "rows.json", ["q", "a"]),
    "table": ({"question": "q", "answer": "a"}, "rows.parquet", ["q", "a"]),
    "documents": ({"text_list": ["a"], "image_info": []}, "rows.jsonl", ["a"]),
    "text": ({"text": "a"}, "rows.jsonl", ["a"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_words_under_keys_of_pictures_are_no_pictures(form: str, folder: Path) -> None:
    row, name, expected = FORMS[form]
    assert seen(source_of(folder, {**row, **WORDS}, name).record(0)) == expected


@pytest.mark.parametrize("key", CLAIMED)
@pytest.mark.parametrize("form", FORMS)
def test_a_key_can_be_ignored(form: str, key: str, folder: Path) -> None:
    row, name, expected = FORMS[form]
    source = source_of(folder, {**row, key: CLAIMED[key]}, name)
    with pytest.raises(
        RecordError, match=rf"unread_media.*'{key}'.*ignore_keys: \[{key}\] of the source leaves it out"
    ):
        source.record(0)
    ignoring = open_source(str(folder / name), settings=[f"ignore_keys=[{key}, other]"])
    assert seen(ignoring.record(0)) == expected
    with pytest.raises(RecordError, match=f"unread_media.*'{key}'"):
        open_source(str(folder / name), settings=["ignore_keys=[other]"]).record(0)


def test_keys_of_turns_and_parts_can_be_ignored(folder: Path) -> None:
    part = {"type": "text", "text": "q", "video_url": "http://a.b/c"}
    rows: list[tuple[str, Any]] = [
        ("media", {"conversations": [{**PLAIN[0], "media": "http://a.b/c"}, PLAIN[1]]}),
        ("img", {"messages": [{**ASKED[0], "img": "a.png"}, ASKED[1]]}),
        ("video_url", {"messages": [{"role": "user", "content": [part]}, ASKED[1]]}),
    ]
    for key, row in rows:
        with pytest.raises(RecordError, match=rf"unread_media: .*\[0\] holds .* ignore_keys: \[{key}\]"):
            source_of(folder, row).record(0)
        source = open_source(str(folder / "rows.jsonl"), settings=[f"ignore_keys=[{key}]"])
        assert seen(source.record(0)) == ["q", "a"]


# ----- what a form is recognised as -----


def test_rows_are_recognised_line_by_line_or_as_a_list(folder: Path) -> None:
    lines = "".join(json.dumps({"id": i, "conversations": PLAIN}) + "\n" for i in range(3))
    for name in ("a.jsonl", "a.json"):
        (folder / name).write_text(lines)
        source = open_source(str(folder / name))
        assert isinstance(source, LlavaJson)
        assert [source.record(i).id for i in range(len(source))] == ["0", "1", "2"]
    (folder / "b.json").write_text(json.dumps([{"messages": CHAT, "images": ["a.png"]}]))
    assert isinstance(open_source(str(folder / "b.json")), ChatJsonl)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"text": "a", "image": None}, "Texts"),
        ({"text": "a", "images": [], "file_name": ""}, "Texts"),
        ({"text": "a", "messages": None, "caption": None}, "Texts"),
        ({"inputs": "q", "targets": "", "conversations": None}, "Texts"),
        ({"conversations": PLAIN, "messages": None, "texts": []}, "LlavaJson"),
        ({"query": "q", "response": None, "conversations": []}, "ChatJsonl"),
        ({"text_list": ["a"], "image_info": [], "messages": None}, "Mmc4"),
        ({"image": None, "caption": "a"}, "Captions"),
        ({"messages": []}, "ChatJsonl"),
    ],
)
def test_keys_that_hold_nothing_do_not_decide_the_form(row: Any, form: str, folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps(row))
    assert recognise(folder / "a.jsonl") == form


def test_empty_keys_of_documents_do_not_hide_others(folder: Path) -> None:
    info = {"image_base64": "", "image_name": "a.png", "matched_text_index": 0}
    source = source_of(folder, {"text_list": ["a"], "image_info": [info]})
    assert source.record(0).images == [Image(path="a.png")]
    assert seen(source_of(folder, {"text": "", "inputs": "q", "targets": "a"}).record(0)) == ["q", "a"]


def test_a_broken_line_of_llava_rows_is_one_bad_sample(folder: Path) -> None:
    row = json.dumps({"conversations": PLAIN})
    (folder / "a.jsonl").write_text(f"{row}\n{row[:20]}\n{row}")
    source = LlavaJson(str(folder / "a.jsonl"))
    assert source.record(2).messages[0].text == "q"
    with pytest.raises(RecordError, match="entry 1 is not JSON"):
        source.record(1)


def test_a_picture_beside_a_text_is_not_taken_for_text(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    with pytest.raises(ValueError, match="--form Captions --set image_column=file_name --set caption_column=text"):
        recognise(folder / "metadata.jsonl")
    settings = ["image_column=file_name", "caption_column=text"]
    source = open_source(str(folder / "metadata.jsonl"), "Captions", settings)
    assert seen(source.record(0)) == ["image", "\nDescribe the image.", "a cat"]
    with pytest.raises(ValueError, match="no line of .* has texts under 'image' and 'caption'"):
        Captions(str(folder / "metadata.jsonl"))


def test_a_broken_line_of_captions_is_one_bad_sample(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"image": "a.png", "caption": "a"}\n{\n{"image": "a.png", "caption": 5}\n')
    source = open_source(str(folder / "a.jsonl"))
    assert len(source) == 3
    for index in (1, 2):
        with pytest.raises(RecordError, match="malformed"):
            source.record(index)


# ----- the listing of bad samples -----


def test_a_picture_written_into_a_row_does_not_fill_the_listing(folder: Path) -> None:
    long = uri(bytes(range(256)) * 40_000)
    rows: list[Any] = [
        {"conversations": PLAIN, "image_path": long},
        {"conversations": PLAIN, "image": long},
        {"conversations": LLAVA, "image": long + "@"},
        {"conversations": LLAVA, "image": long.replace("data:", "")},
        {"conversations": [{"from": long, "value": "q"}]},
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(TooManyBad):
        convert(open_source(str(folder / "rows.json")), folder / "out")
    lines = (folder / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
    assert max(map(len, lines)) < 2 * MAX_DETAIL


def test_a_cut_detail_says_so_and_keeps_both_ends() -> None:
    error = RecordError("malformed", f"begin {'x' * 5000} end")
    assert len(error.detail) < MAX_DETAIL
    assert error.detail.startswith("begin x")
    assert error.detail.endswith("x end")
    assert "letters left out" in error.detail
    assert RecordError("malformed", "short").detail == "short"
