"""Sources: what they read, what they refuse, and the schema of a record."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lit_vlm.data.records import ROLES, Image, Message, RecordError, Text, open_image
from lit_vlm.data.records.media import ADDRESS, MEDIA_FILE, MEDIA_KEY
from lit_vlm.data.records.parsing import parse_record
from lit_vlm.data.sources import Captions, ChatJsonl, LlavaJson, Mmc4, Parquet, Pictures, Texts, WebDataset
from lit_vlm.data.sources.base import hash_files

SCHEMA = json.loads(resources.files("lit_vlm.data.records").joinpath("record.schema.json").read_text())


def turn(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


def llava(folder: Path, *entries: Any, **options: Any) -> LlavaJson:
    (folder / "chat.json").write_text(json.dumps(entries))
    return LlavaJson(str(folder / "chat.json"), **options)


def chat(folder: Path, *lines: str) -> ChatJsonl:
    (folder / "chat.jsonl").write_text("\n".join(lines))
    return ChatJsonl(str(folder / "chat.jsonl"))


# ----- LLaVA's form -----


def test_llava_reads_a_conversation(tmp_path: Path) -> None:
    entry = {
        "id": 7,
        "image": "a.png",
        "conversations": [turn("human", "what?\n<image>"), turn("gpt", "a cat"), turn("human", "ok"), turn("gpt", "y")],
    }
    source = llava(tmp_path, entry)
    record = source.record(0)
    assert (len(source), source.name, source.image_folder, record.id, record.source) == (
        1,
        "chat",
        tmp_path,
        "7",
        "chat",
    )
    assert record.messages == (
        Message("user", (Image(path="a.png"), Text("\nwhat?"))),
        Message("assistant", (Text("a cat"),)),
        Message("user", (Text("ok"),)),
        Message("assistant", (Text("y"),)),
    )


def test_llava_uses_a_list_of_images_in_the_order_of_the_marks(tmp_path: Path) -> None:
    entry = {
        "image": ["a.png", "b.png", "c.png"],
        "conversations": [
            turn("human", "<image> and <image>?"),
            turn("gpt", "x"),
            turn("human", "<image>!"),
            turn("gpt", "y"),
        ],
    }
    in_place = llava(tmp_path, entry, image_position="in_place").record(0)
    assert in_place.messages[0].content == (Image(path="a.png"), Text(" and "), Image(path="b.png"), Text("?"))
    front = llava(tmp_path, entry).record(0)
    assert front.messages[0].content == (Image(path="a.png"), Image(path="b.png"), Text("\nand ?"))
    assert [image.path for image in front.images] == ["a.png", "b.png", "c.png"]
    assert front.id == "0"


def test_llava_takes_text_only_entries(tmp_path: Path) -> None:
    conversation = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    record = llava(tmp_path, {"id": "t", "image": None, "conversations": conversation}).record(0)
    assert [message.role for message in record.messages] == ["system", "user", "assistant"]
    assert record.images == []
    calls = [turn("human", "q"), turn("function_call", "f()"), turn("observation", "5"), turn("gpt", "five")]
    record = llava(tmp_path, {"conversations": calls}).record(0)
    assert [message.role for message in record.messages] == ["user", "assistant", "tool", "assistant"]


CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_calls_of_tools_beside_the_text_are_not_lost(tmp_path: Path) -> None:
    asked, told = {"role": "user", "content": "q"}, {"role": "tool", "content": "5"}
    called = {"role": "assistant", "content": "Let me see.", "tool_calls": CALL}
    with pytest.raises(RecordError, match=r"unread_calls: messages\[1\] .* under 'tool_calls', .*text of its answer"):
        parse_record({"messages": [asked, called, told, {"role": "assistant", "content": "a"}]}, "chats", "0", False)
    with pytest.raises(RecordError, match="unread_calls: the record holds .* under 'tools'"):
        parse_record({"messages": [asked, {"role": "assistant", "content": "a"}], "tools": CALL}, "chats", "0", False)
    rows = [turn("human", "q"), turn("gpt", "a")]
    with pytest.raises(RecordError, match="unread_calls: entry 0 holds '.f.' under 'tools'"):
        llava(tmp_path, {"conversations": rows, "tools": "[f]"}).record(0)
    assert llava(tmp_path, {"conversations": rows, "tools": ""}).record(0)
    assert llava(tmp_path, {"conversations": rows, "tools": "[f]"}, ignore_keys=["tools"]).record(0)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"conversations": [turn("human", "<image>")]}, r"image_count: 1 <image> marks in the text, 0 images"),
        ({"image": "a.png", "conversations": [turn("human", "hi")]}, r"image_count: 0 <image> marks in the text, 1"),
        ({"image": ["a", "b"], "conversations": [turn("human", "<image>")]}, r"image_count: 1 .* 2 images"),
        ({"conversations": [turn("robot", "hi")]}, r"unknown_role: conversations\[0\]\.from is 'robot'; known: human"),
        ({"conversations": ["hi"]}, r"unknown_role: conversations\[0\]\.from is 'hi'"),
        ({"conversations": [turn("human", 5)]}, r"malformed: conversations\[0\]\.value is not a string"),
        ({"conversations": []}, r"malformed: entry 0 has no list 'conversations'"),
        ({"conversations": "hi"}, r"malformed: entry 0 has no list 'conversations'"),
        ({}, r"malformed: entry 0 has no list 'conversations'"),
        (5, r"malformed: entry 0 has no list 'conversations'"),
        ({"image": 5, "conversations": [turn("human", "<image>")]}, r"malformed"),
        ({"conversations": [{"from": ["human"], "value": "hi"}]}, r"unknown_role"),
    ],
    ids=[
        "no image", "no mark", "too few marks", "role", "turn is text", "value is a number", "empty", "text", "nothing",
        "number", "image is a number", "role is a list",
    ],
)  # fmt: skip
def test_llava_refuses_an_entry_with_the_reason(entry: Any, expected: str, tmp_path: Path) -> None:
    source = llava(tmp_path, entry)
    with pytest.raises(RecordError, match=expected):
        source.record(0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is not JSON"), ('{"a": 1}', "holds a dict; expected a list of samples"), ("7\n8", "is not JSON")],
)
def test_llava_refuses_a_file_of_another_form(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        LlavaJson(str(tmp_path / "a.json"))


# ----- the chat form -----


def test_chat_reads_one_record_per_line(tmp_path: Path) -> None:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}),
        "",
        json.dumps(
            {
                "id": "b",
                "options": ["x", "y"],
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "a.png"},
                            {"type": "text", "text": "a"},
                            {"type": "image", "image": "b.png"},
                            {"type": "text", "text": "b", "loss": True},
                        ],
                    }
                ],
            }
        ),
    ]
    source = chat(tmp_path, *lines)
    assert len(source) == 2
    assert source.record(0).messages[0] == Message("user", (Text("hi"),))
    assert source.record(0).id == "0"
    second = source.record(1)
    assert (second.id, second.options) == ("b", ("x", "y"))
    assert second.messages[0].content == (Image(path="a.png"), Text("a"), Image(path="b.png"), Text("b", True))


def test_a_malformed_line_is_one_bad_sample_only(tmp_path: Path) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    source = chat(tmp_path, good, '{"messages": [', good)
    assert len(source) == 3
    assert source.record(2).messages[0].text == "hi"
    with pytest.raises(RecordError, match=r"malformed: .*chat\.jsonl entry 1 is not JSON: "):
        source.record(1)


def test_a_line_that_is_not_utf8_is_one_bad_sample_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": [{"role": "user", "content": "\xff"}]}\n{"messages": []}')
    with pytest.raises(RecordError, match="is not JSON"):
        ChatJsonl(str(tmp_path / "a.jsonl")).record(0)


def test_chat_keeps_separators_inside_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    assert ChatJsonl(str(tmp_path / "a.jsonl")).record(0).messages[0].text == text


def test_an_unknown_role_is_named(tmp_path: Path) -> None:
    source = chat(tmp_path, json.dumps({"messages": [{"role": "human", "content": "hi"}]}))
    with pytest.raises(RecordError, match=r"unknown_role: messages\[0\]\.role is 'human'; roles: system, user"):
        source.record(0)


@pytest.mark.parametrize("cls", [ChatJsonl, LlavaJson, Captions, Mmc4, Texts, Parquet, Pictures, WebDataset])
def test_a_missing_file_is_named(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: /no/such/file.json does not exist"):
        cls("/no/such/file.json")


def test_names_and_image_folders_can_be_set(tmp_path: Path) -> None:
    source = llava(tmp_path, {"conversations": [turn("human", "hi")]}, name="mine", image_folder="/pictures")
    assert (source.name, source.image_folder) == ("mine", Path("/pictures"))


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    first = chat(tmp_path, '{"messages": []}').fingerprint()
    assert chat(tmp_path, '{"messages": []}').fingerprint() == first
    assert chat(tmp_path, '{"messages": [1]}').fingerprint() != first


# ----- captions -----


@pytest.mark.parametrize(
    ("suffix", "mark", "written", "caption"),
    [("csv", ",", '"a, cat"', "a, cat"), ("tsv", "\t", '"a" cat', '"a" cat'), ("tsv", "\t", '"open', '"open')],
)
def test_captions_from_a_table(suffix: str, mark: str, written: str, caption: str, tmp_path: Path) -> None:
    table = tmp_path / f"table.{suffix}"
    table.write_text(f"image{mark}caption\na.png{mark}{written}\nb.png{mark}\n", encoding="utf-8")
    source = Captions(str(table), prompt="What?")
    assert len(source) == 2
    record = source.record(0)
    assert (record.id, record.source) == ("a.png", "table")
    assert record.messages == (
        Message("user", (Image(path="a.png"), Text("\nWhat?"))),
        Message("assistant", (Text(caption),)),
    )
    with pytest.raises(RecordError, match=r"malformed: b\.png has no caption"):
        source.record(1)


def test_captions_from_other_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("n,file,text\n1,a.png,a cat\n")
    source = Captions(str(tmp_path / "t.csv"), image_column="file", caption_column="text", image_folder="/p")
    assert source.record(0).messages[1].text == "a cat"
    assert source.image_folder == Path("/p")
    with pytest.raises(ValueError, match=r"t\.csv has no column 'image', only \['n', 'file', 'text'\]"):
        Captions(str(tmp_path / "t.csv"))


def test_captions_from_a_table_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,caption\na.png,é\n", encoding="utf-8-sig")
    assert Captions(str(tmp_path / "t.csv")).record(0).messages[1].text == "é"


def test_captions_from_a_folder(tmp_path: Path, png: Callable[..., bytes]) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.png", "sub/c.PNG"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "a.txt").write_text(" a cat \n")
    (tmp_path / "sub" / "c.txt").write_text("a dog")
    source = Captions(str(tmp_path))
    assert len(source) == 3
    assert source.record(0).messages[1].text == "a cat"
    assert source.record(2).id == "sub/c.PNG"
    assert open_image(source.record(2).images[0], source.image_folder).size == (8, 8)
    with pytest.raises(RecordError, match=r"b\.png has no caption"):
        source.record(1)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no \.jpg or \.jpeg or .* file in"):
        Captions(str(tmp_path))


# ----- missing images and paths outside the folder -----


@pytest.mark.parametrize(("path", "reason"), [("a.png", "missing_image"), ("../a.png", "outside_folder")])
def test_images_are_looked_for_in_the_folder_only(path: str, reason: str, tmp_path: Path) -> None:
    source = llava(tmp_path, {"image": path, "conversations": [turn("human", "<image>"), turn("gpt", "x")]})
    record = source.record(0)
    with pytest.raises(RecordError, match=reason):
        open_image(record.images[0], source.image_folder)


# ----- the schema -----


def message(turns: Any = ({"role": "user", "content": "hi"},), **changes: Any) -> dict[str, Any]:
    return {"messages": list(turns), **changes}


def parts(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


RAW: dict[str, Any] = {
    "text": message(),
    **{f"of {role}": message([{"role": role, "content": "hi"}]) for role in ROLES},
    "string id": message(id="a"),
    "integer id": message(id=3),
    "null id": message(id=None),
    "list id": message(id=[1]),
    "float id": message(id=1.5),
    "true id": message(id=True),
    "other keys": message(more=1),
    "options": message(options=["a", "b"]),
    "no options": message(options=[]),
    "null options": message(options=None),
    "number options": message(options=[1]),
    "text options": message(options="ab"),
    "image": parts({"type": "image", "image": "a.png"}),
    "text part": parts({"type": "text", "text": "a"}),
    "empty text": parts({"type": "text", "text": ""}),
    "no text": parts({"type": "text"}),
    "number text": parts({"type": "text", "text": 1}),
    "loss": parts({"type": "text", "text": "a", "loss": True}),
    "no loss": parts({"type": "text", "text": "a", "loss": False}),
    "null loss": parts({"type": "text", "text": "a", "loss": None}),
    "text loss": parts({"type": "text", "text": "a", "loss": "yes"}),
    "zero loss": parts({"type": "text", "text": "a", "loss": 0}),
    "one loss": parts({"type": "text", "text": "a", "loss": 1}),
    "other type": parts({"type": "video", "video": "a"}),
    "no type": parts({"text": "a"}),
    "string part": parts("a"),
    "text and image": parts({"type": "text", "text": "a", "image": "b"}),
    "text and no image": parts({"type": "text", "text": "a", "image": None, "video": ""}),
    "picture of a part by url": parts({"type": "image", "url": "a.png"}),
    "image_url": parts({"type": "image_url", "image_url": {"url": "file:///a.png"}}),
    "image_url as text": parts({"type": "image_url", "image_url": "a.png"}),
    "remote image_url": parts({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}),
    "remote image": parts({"type": "image", "image": "s3://a/c.png"}),
    "mark and images": message([{"role": "user", "content": "<image>hi"}], images=["a.png"]),
    "mark and image": message([{"role": "user", "content": "<image>hi"}], image="a.png"),
    "mark and object": message([{"role": "user", "content": "<image>hi"}], images=[{"path": "a.png", "bytes": None}]),
    "mark and base64": message([{"role": "user", "content": "<image>hi"}], images=[{"bytes": "aGk="}]),
    "mark and number": message([{"role": "user", "content": "<image>hi"}], images=[1]),
    "mark and null": message([{"role": "user", "content": "<image>hi"}], images=["a.png", None]),
    "mark and address": message([{"role": "user", "content": "<image>hi"}], images=["http://a.b/c.png"]),
    "part and images": message([{"role": "user", "content": [{"type": "image"}]}], images=["a.png"]),
    "no picture": message(images=[], image=None, videos=None, audios=[], video=0, image_path=""),
    "empty object": message(image={"bytes": None, "path": None}),
    "number as image": message(image=1),
    "false as image": message(image=False),
    "videos": message(videos=["a.mp4"]),
    "audio_path": message(audio_path="a.wav"),
    "second picture": message([{"role": "user", "content": "<image>hi"}], image="a.png", image_2="b.png"),
    "where it comes from": message([{"role": "user", "content": "<image>hi"}], image="a.png", image_url="http://a.b/c"),
    "picture of a message": message([{"role": "user", "content": "hi", "images": ["a.png"]}]),
    "words about pictures": message(
        has_images="no", text_image="no", media="BBC", image_file="none", images_list=["n/a"]
    ),
    "numbers of pictures": message(image_list=[1, [2.5, True]], video={"id": 3, "path": None}),
    "words about pictures of a message": message([{"role": "user", "content": "hi", "has_image": "yes"}]),
    "words about pictures of a part": parts({"type": "text", "text": "a", "image": "none"}),
    "medium that has an address": message(media="http://a.b/c"),
    "medium that is a path": message(media="a/clip-1"),
    "medium in capital letters": message(media_name="A.MP4"),
    "medium in base64": message(audio="aGk" * 40),
    "medium in an object": message(audio={"bytes": "aGk="}),
    "medium in another object": message(video={"id": 3, "file": ["x.mp4"]}),
    "picture of a part in an object": parts({"type": "text", "text": "a", "image": {"url": "x"}}),
    "size of a picture": message(image_size=[3, 4], image_id="7"),
    "texts": {"texts": [{"user": "q", "assistant": "a", "source": "s"}], "images": ["a.png"]},
    "texts that are text": {"texts": ["a", "b"]},
    "texts without answer": {"texts": [{"user": "q"}]},
    "query": {"query": "<image>q", "response": "a", "images": ["a.png"], "system": "s", "history": [["q", "a"]]},
    "query alone": {"query": "q"},
    "empty query": {"query": "", "response": "a"},
    "query of parts": {"query": [{"type": "text", "text": "q"}], "response": "a"},
    "half a history": {"query": "q", "response": "a", "history": [["q"]]},
    "messages beside others": message(texts="notes", query=7, response=None, history="h", system=1),
    "null messages and texts": {"messages": None, "texts": [{"user": "q", "assistant": "a"}]},
    "response that is null": {"query": "q", "response": None},
    "no parts": parts(),
    "null content": message(messages=[{"role": "user", "content": None}]),
    "no content": message(messages=[{"role": "user"}]),
    "object content": message(messages=[{"role": "user", "content": {"type": "text", "text": "a"}}]),
    "number content": message(messages=[{"role": "user", "content": 1}]),
    "empty content": message(messages=[{"role": "user", "content": ""}]),
    "document": message(messages=[{"role": "document", "content": "a"}]),
    "system": message(messages=[{"role": "system", "content": "a"}]),
    "other role": message(messages=[{"role": "human", "content": "a"}]),
    "no role": message(messages=[{"content": "a"}]),
    "list role": message(messages=[{"role": ["user"], "content": "a"}]),
    "no messages": message(messages=[]),
    "null messages": message(messages=None),
    "object messages": message(messages={"role": "user", "content": "a"}),
    "string message": message(messages=["hi"]),
    "missing messages": {"id": "a"},
    "list": [],
    "string": "hi",
    "null": None,
}


BEYOND: dict[str, tuple[Any, str]] = {
    "part without path": (parts({"type": "image"}), r"image_count: 1 <image> marks .* 0 pictures"),
    "empty image": (parts({"type": "image", "image": ""}), "image_count"),
    "null image": (parts({"type": "image", "image": None}), "image_count"),
    "mark without picture": (message([{"role": "user", "content": "<image>hi"}]), "image_count: 1 .* 0 pictures"),
    "mark beside a part": (parts({"type": "image", "image": "a"}, {"type": "text", "text": "<image>"}), "image_count"),
    "too many marks": (
        message([{"role": "user", "content": "<image><image>"}], images=["a"]),
        "image_count: 2 .* 1 pic",
    ),
    "picture without mark": (message(images=["a.png"]), "image_count: 0 <image> marks .* 1 pictures"),
    "two keys": (message(image="a.png", images=["b.png"]), "malformed: 'image' and 'images' hold different"),
    "image_path": (message(image_path="a.png"), "unread_media: the record holds 'a.png' under 'image_path'"),
    "img": (message(img="a.png"), "unread_media.*'img'"),
    "image_url": (message(image_url="http://a.b/c.png"), "unread_media.*'image_url'"),
    "left_image": (message(left_image="a.png"), "unread_media.*'left_image'"),
    "file_name": (message(file_name="a.PNG"), "unread_media.*'file_name'"),
    "Qwen-VL": (
        message([{"role": "user", "content": "Picture 1: <img>a.png</img>"}]),
        "unread_media.*<img>a.png</img>",
    ),
}
"""What a schema cannot say: numbers that must agree, and keys that matter only without a picture."""


@pytest.mark.parametrize("name", BEYOND)
def test_what_the_schema_cannot_say_is_refused_too(name: str) -> None:
    raw, expected = BEYOND[name]
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(raw)
    with pytest.raises(RecordError, match=expected):
        parse_record(raw, "source", "0")


@pytest.mark.parametrize("name", RAW)
def test_the_schema_accepts_what_parse_record_accepts(name: str) -> None:
    try:
        parse_record(RAW[name], "source", "0")
        accepted = True
    except RecordError:
        accepted = False
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(RAW[name]) == accepted


def test_the_schema_knows_the_same_keys_as_the_readers() -> None:
    pattern = re.sub(r"\?P<\w+>", "", MEDIA_KEY.pattern)
    assert list(SCHEMA["$defs"]["without_media"]["patternProperties"]) == [pattern]
    address, ending = (one["pattern"] for one in SCHEMA["$defs"]["media"]["anyOf"][:2])
    assert address == ADDRESS.pattern
    assert ending == re.sub("[a-z]", lambda letter: f"[{letter[0].upper()}{letter[0]}]", MEDIA_FILE.pattern)
    beside_a_picture = "|".join(f"({key})" for key in SCHEMA["patternProperties"])
    for key in KEYS:
        found = MEDIA_KEY.match(key)
        other = found is not None and (found["number"] or found["medium"].lower() in ("video", "audio", "media"))
        assert bool(re.search(beside_a_picture, key)) == bool(other)


KEYS = {
    "image": True, "images": True, "image_path": True, "imagePath": True, "image_file_name": True, "imageUrls": True,
    "img": True, "imgs": True, "img_path": True, "image_base64_str": True, "Image": True, "IMAGE": True,
    "image_local_path": True, "left_image": True, "image_1": True, "image12": True, "picture": True, "photos": True,
    "video": True, "videos": True, "video_url": True, "audio": True, "audio_path": True, "audio_2": True, "media": True,
    "image_size": False, "image_id": False, "image_width": False, "image_caption": False, "imagenet": False,
    "num_images_seen": False, "text": False, "url": False, "mediator": False, "imagination": False, "videogame": False,
    "source_filename": False, "messages": False, "texts": False, "query": False, "options": False, "role": False,
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_name_media(key: str) -> None:
    assert bool(MEDIA_KEY.match(key)) == KEYS[key]


def test_the_schema_itself_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_files_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "rows.json", []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(1) or whole(*given))
    file.write_text("first")
    first = hash_files([file])
    assert hash_files([file]) == first
    assert len(read) == 1
    file.write_text("other")
    assert hash_files([file]) != first
    assert len(read) == 2
