"""The source: records of every kind, and what decides them."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_vlm.data.records import Image, Record, Text, open_image
from lit_vlm.worlds.scenes import QUESTION_KINDS, Scenes
from lit_vlm.worlds.scenes.__main__ import main
from lit_vlm.worlds.scenes.source import VERSION, Kind
from lit_vlm.worlds.scenes.world import Wording

KINDS: tuple[Kind, ...] = ("captions", "questions", "text", "interleaved")
WORDINGS: tuple[Wording, ...] = ("varied", "plain")
WORDS = 85
"""More than there are: a guard against a vocabulary that grows unnoticed."""


def words(record: Record) -> list[str]:
    texts = [*(message.text for message in record.messages), *record.options]
    return [word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())]


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_valid_and_their_images_decode(kind: Kind) -> None:
    source = Scenes(kind, 20, size=48, shots=3)
    assert (len(source), source.name) == (20, f"scenes_{kind}")
    pictures = {"captions": 1, "questions": 1, "text": 0, "interleaved": 3}[kind]
    for index in range(20):
        record = source.record(index)
        roles = [message.role for message in record.messages]
        assert roles in {"text": (["document"], ["user", "assistant"]), "interleaved": (["document"],)}.get(
            kind, (["user", "assistant"],)
        )
        assert record.source == source.name
        assert len(record.images) == pictures
        for image, maps in zip(record.images, source.maps(index), strict=True):
            assert image.size == (48, 48)
            assert np.array_equal(np.asarray(open_image(image, source.image_folder)), maps.image)
        if record.options:
            assert record.options.count(record.messages[-1].text) == 1


def test_questions_take_turns() -> None:
    kinds = [Scenes("questions", 500, size=32).outline(index).id.split("-")[0] for index in range(500)]
    assert all(set(kinds[start : start + 5]) == set(QUESTION_KINDS) for start in range(0, 500, 5))
    for stride in (2, 5, 10):  # an order that repeated would show every fifth reader one kind only
        assert set(kinds[::stride]) == set(QUESTION_KINDS)
    record = Scenes("questions", 4, size=32, question_kinds=["depth"]).record(0)
    image, text = record.messages[0].content
    assert isinstance(image, Image)
    assert isinstance(text, Text)
    assert text.text.startswith("\nWhich is closer to the camera")


@pytest.mark.parametrize("kind", ["questions", "text"])
def test_several_questions_about_one_scene(kind: Kind) -> None:
    source, single = Scenes(kind, 40, size=32, turns=4), Scenes(kind, 40, size=32)
    lengths = set()
    for index in range(40):
        record, first = source.outline(index), single.outline(index)
        if "document" in (record.messages[0].role, first.messages[0].role):
            continue
        lengths.add(len(record.messages))
        assert [message.role for message in record.messages] == ["user", "assistant"] * (len(record.messages) // 2)
        questions = [message.text.strip().split("\n")[-1] for message in record.messages[::2]]
        assert len(set(questions)) == len(questions)
        assert questions[0] == first.messages[0].text.strip().split("\n")[-1]
        assert record.messages[1].text == first.messages[1].text
        assert record.options.count(record.messages[-1].text) == 1
    assert lengths <= {2, 4, 6, 8}
    assert max(lengths) == 8


def test_interleaved_documents_alternate() -> None:
    source = Scenes("interleaved", 20, size=32, question_kinds=["distance"])
    texts = []
    for index in range(20):
        (message,) = source.record(index).messages
        assert [type(part) for part in message.content] == [Image, Text] * 4
        assert len({part.data for part in message.content if isinstance(part, Image)}) == 4
        texts.append(message.text)
    assert {text.count("Question: Which is closer to the") for text in texts} == {0, 4}
    assert all(text.count("closer to the") == 4 for text in texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_depends_on_its_index_and_the_arguments_only(kind: Kind) -> None:
    source, longer = Scenes(kind, 5, size=32), Scenes(kind, 50, size=32)
    records = [source.record(index) for index in (4, 0, 4)]
    assert records[0] == records[2] == longer.record(4)
    assert records[0] != Scenes(kind, 5, size=32, seed=1).record(4)
    with pytest.raises(IndexError, match="index is 5; the source has 5 samples"):
        source.record(5)


def test_records_are_the_same_in_every_process() -> None:
    """If this fails because the records were changed on purpose, raise `VERSION` and put the new hash here."""
    digest = hashlib.sha256()
    for kind, wording in itertools.product(KINDS, WORDINGS):
        source = Scenes(kind, 30, wording=wording)
        for index in range(30):
            record = source.outline(index)
            digest.update(repr((record.id, [message.text for message in record.messages], record.options)).encode())
    assert (VERSION, digest.hexdigest()[:16]) == (4, "42ccced9c42e77f5")


@pytest.mark.parametrize("kind", KINDS)
def test_outlines_are_records_without_bytes(kind: Kind) -> None:
    source = Scenes(kind, 3, size=32)
    for index in range(3):
        outline, record = source.outline(index), source.record(index)
        assert (outline.id, outline.options) == (record.id, record.options)
        assert [m.text for m in outline.messages] == [m.text for m in record.messages]
        assert [(image.data, image.size) for image in outline.images] == [(None, image.size) for image in record.images]


def test_held_out_scenes_are_others() -> None:
    splits = [Scenes("questions", 300, size=32, split=split) for split in ("train", "held_out")]
    train, held_out = ({source.record(i).images[0].data for i in range(300)} for source in splits)
    assert len(train) == len(held_out) == 300
    assert not train & held_out


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_unique(kind: Kind) -> None:
    source = Scenes(kind, 200)
    assert len({source.outline(index).id for index in range(200)}) == 200


def test_counts_follow_from_the_text() -> None:
    source = Scenes("text", 300, question_kinds=["count"])
    for index in range(300):
        text = source.record(index).messages[0].text
        count = re.search(r"How many (.+?) are there", text)
        answer = text.rsplit("Answer: ", 1)[-1] if "Answer: " in text else source.record(index).messages[-1].text
        assert count
        numbers = {"a": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
        listed = re.findall(r"(a|two|three|four|five|six) ((?:small|large) \w+ \w+?)s?\b", text.split("\n")[0].lower())
        wanted = {re.sub("s$", "", word) for word in count[1].split()} - {"thing"}
        assert str(sum(numbers[n] for n, look in dict.fromkeys(listed) if wanted <= set(look.split()))) == answer


def test_what_a_text_asks_for_is_stated_in_it() -> None:
    source = Scenes("text", 100, question_kinds=["relation", "depth", "distance"])
    for index in range(100):
        record = source.record(index)
        description, question = record.messages[0].text.split("\n")[:2]
        names = re.findall(r"the ((?:\w+ )*?(?:sphere|cube|cylinder|cone|thing))", question.lower())
        words = {"relation": " is ", "depth": " than | in front of | behind ", "distance": " is closer to .+ than to "}
        kind = record.id.split("-")[1]
        facts = [fact for fact in description.split(". ")[1:] if re.search(words[kind], fact)]
        assert len(names) == (3 if kind == "distance" else 2)
        assert facts


def test_the_vocabulary_is_small() -> None:
    found: set[str] = set()
    for kind in KINDS:
        source = Scenes(kind, 250)
        found.update(word for index in range(250) for word in words(source.outline(index)))
    assert len(found) <= WORDS, sorted(found)


def test_the_fingerprint_tells_arguments_apart() -> None:
    base: dict[str, Any] = {"kind": "questions", "count": 5}
    others: list[dict[str, Any]] = [
        {"kind": "text"}, {"count": 6}, {"seed": 1}, {"size": 64}, {"split": "held_out"},
        {"question_kinds": ["count"]}, {"shots": 2}, {"name": "mine"}, {"turns": 2}, {"max_things": 3},
        {"thing_scale": 0.5}, {"cropped": True},
    ]  # fmt: skip
    prints = [Scenes(**(base | other)).fingerprint() for other in [{}, *others]]
    assert len(set(prints)) == len(prints)
    assert Scenes(**base).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kind": "poems"}, "kind: 'poems' is unknown; use captions, questions"),
        ({"split": "test"}, "split: 'test' is unknown; use train, held_out"),
        ({"question_kinds": ["size"]}, "question_kinds: 'size' is unknown; use count"),
        ({"question_kinds": []}, "question_kinds is .* leave it out"),
        ({"kind": "captions", "question_kinds": ["count"]}, "question_kinds is .* leave it out"),
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"size": 16}, "size is 16; it must be at least 32"),
        ({"shots": 0}, "shots is 0; it must be at least 1"),
        ({"turns": 0}, "turns is 0; it must be at least 1"),
        ({"kind": "captions", "turns": 2}, "turns is 2 with kind 'captions'; only questions and text take turns"),
        ({"max_things": 2}, "max_things is 2; it must be from 3 to 6 for questions of the kinds count, relation"),
        ({"max_things": 7}, "max_things is 7; it must be from 3 to 6"),
        (
            {"max_things": 1, "question_kinds": ["depth"]},
            "max_things is 1; it must be from 2 to 6 for questions of the",
        ),
        ({"max_things": 0, "kind": "captions"}, "max_things is 0; it must be from 1 to 6"),
        ({"thing_scale": 0.3}, "thing_scale is 0.3; for pictures of 96 pixels it must be from 0.333 to 1"),
        ({"thing_scale": 1.5}, "thing_scale is 1.5; for pictures of 96 pixels it must be from 0.333 to 1"),
        ({"thing_scale": 0.5, "size": 48}, "thing_scale is 0.5; for pictures of 48 pixels it must be from 0.667 to 1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Scenes(**({"kind": "questions", "count": 5} | arguments))


def test_a_sheet_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["scenes", str(out), "--count", "3"])
    main()
    assert open_image(Image(path="sheet.png"), tmp_path).width > 900


def test_images_first_is_the_same_document_with_its_pictures_in_front() -> None:
    plain, front = (Scenes("interleaved", 4, shots=3, images_first=first) for first in (False, True))
    for index in range(4):
        content, moved = (source.record(index).messages[0].content for source in (plain, front))
        assert [isinstance(part, Image) for part in moved] == [True] * 3 + [False] * 3
        assert list(moved) == [p for p in content if isinstance(p, Image)] + [p for p in content if isinstance(p, Text)]
    assert plain.fingerprint() != front.fingerprint()
    with pytest.raises(ValueError, match="images_first is for kind interleaved"):
        Scenes("captions", 4, images_first=True)


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_things_are_smaller_in_every_kind_of_record(kind: Any) -> None:
    usual, small = (Scenes(kind, 8, shots=2, thing_scale=scale) for scale in (1.0, 0.5))
    for index in range(8):
        record = small.record(index)
        assert len(record.images) == len(usual.record(index).images)
    if kind != "text":
        covered = [
            sum(int((one.segmentation > 0).sum()) for index in range(8) for one in source.maps(index))
            for source in (usual, small)
        ]
        assert covered[1] < 0.4 * covered[0]


@pytest.mark.parametrize("kind", ["captions", "questions", "interleaved"])
def test_cropped_pictures_hold_all_things_and_have_the_size_that_is_told_without_drawing(kind: Any) -> None:
    whole, cropped = (Scenes(kind, 12, shots=2, size=128, cropped=one) for one in (False, True))
    shapes = set()
    for index in range(12):
        outlines = cropped.outline(index).images
        for image, outline, full, truth in zip(
            cropped.record(index).images, outlines, whole.record(index).images, whole.maps(index), strict=True
        ):
            picture, square = (np.array(open_image(one, Path())) for one in (image, full))
            assert outline.size == image.size == picture.shape[1::-1]
            rows, columns = (np.flatnonzero((truth.segmentation > 0).any(axis)) for axis in (1, 0))
            top, left = next(
                (row, column)
                for row in range(129 - picture.shape[0])
                for column in range(129 - picture.shape[1])
                if (square[row : row + picture.shape[0], column : column + picture.shape[1]] == picture).all()
            )
            assert top <= rows[0] <= rows[-1] < top + picture.shape[0]
            assert left <= columns[0] <= columns[-1] < left + picture.shape[1]
            shapes.add(round(picture.shape[1] / picture.shape[0], 1))
    assert len(shapes) > 4
    with pytest.raises(ValueError, match="leave out maps, or cropped"):
        Scenes(kind, 1, cropped=True, maps=6)


@pytest.mark.parametrize(("most", "kinds"), [(1, ["attribute"]), (2, ["attribute", "relation", "depth"])])
def test_a_small_scene_holds_no_more_things_and_has_clear_questions(most: int, kinds: list[Any]) -> None:
    for arguments in ({"kind": "captions"}, {"kind": "questions", "question_kinds": kinds, "turns": 3}):
        source = Scenes(**arguments, count=40, max_things=most, wording="plain")
        seen = {int(rendering.segmentation.max()) for index in range(40) for rendering in source.maps(index)}
        assert seen == set(range(1, most + 1))
        assert all(source.record(index).messages[-1].text for index in range(40))
