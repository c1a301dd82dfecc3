"""Letters for what is seen: what a document tells, recomputed from what its pictures show."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from lit_vlm.data.records import Text, open_image
from lit_vlm.evaluation.tasks import LetterNamings, Prompts, Shots
from lit_vlm.worlds.namings import ATTRIBUTES, LETTERS, Kind, Namings
from lit_vlm.worlds.scenes import render

GIVEN = re.compile(r"(?<![A-Z])[E-Z](?![A-Za-z])")
"""A capital letter that begins no word."""


@pytest.mark.parametrize("shots", [4, 7])
def test_a_letter_stands_for_one_value_of_a_document_and_is_said_before_it_is_asked(shots: int) -> None:
    source = Namings("questions", 60, shots=shots)
    for index in range(60):
        naming = source.naming(index)
        values = [getattr(scene.things[0].look, naming.attribute) for scene in naming.scenes]
        assert all(len(scene.things) == 1 for scene in naming.scenes)
        named = dict(zip(values, naming.letters, strict=True))
        assert [named[value] for value in values] == list(naming.letters)
        assert len(set(named.values())) == len(named) == 4
        assert set(values[:-1]) == set(values)
        assert sorted(naming.options) == sorted(named.values())
        assert set(naming.options) <= set(LETTERS)


def test_nothing_but_the_document_tells_a_letter() -> None:
    source = Namings("questions", 2000)
    namings = [source.naming(index) for index in range(2000)]
    asked = Counter((getattr(one.scenes[-1].things[0].look, one.attribute), one.letters[-1]) for one in namings)
    assert max(asked.values()) <= 30  # 1000 questions about four shapes and 20 letters: 12.5 of each on average
    places = Counter(one.letters[:-1].index(one.letters[-1]) for one in namings)
    assert all(430 < places[place] < 570 for place in range(4))
    assert all(430 < count < 570 for count in Counter(one.options.index(one.letters[-1]) for one in namings).values())
    assert {one.attribute for one in namings} == set(ATTRIBUTES)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_records_show_the_things_that_are_named(kind: Kind) -> None:
    source = Namings(kind, 8, size=48)
    for index in range(8):
        record, naming = source.record(index), source.naming(index)
        assert source.outline(index).messages[-1].text == record.messages[-1].text
        text = "".join(message.text for message in record.messages)
        assert tuple(GIVEN.findall(text)) == naming.letters
        if kind == "text":
            assert not record.images
            assert all(getattr(scene.things[0].look, naming.attribute) in text for scene in naming.scenes)
        else:
            for image, scene in zip(record.images, naming.scenes, strict=True):
                assert np.array_equal(np.asarray(open_image(image, source.image_folder)), render(scene, 48).image)
        assert record.options == (naming.options if kind == "questions" else ())


@pytest.mark.parametrize("kind", ["interleaved", "text"])
def test_half_of_the_documents_have_the_letter_beside_what_it_stands_for(kind: Kind) -> None:
    source = Namings(kind, 200)
    bare = 0
    for index in range(200):
        naming, (message,) = source.naming(index), source.outline(index).messages
        said = [one.text.strip() for one in message.content if isinstance(one, Text)]
        said = said[1::2] if kind == "text" else said
        bare += said == list(naming.letters)
    assert 80 < bare < 120


def test_splits_and_seeds_differ_and_arguments_decide_everything() -> None:
    first = Namings("questions", 3)
    assert first.record(2).messages[1].text == Namings("questions", 9).record(2).messages[1].text
    others = [
        Namings("questions", 3, seed=1),
        Namings("questions", 3, split="held_out"),
        Namings("questions", 3, shots=5),
    ]
    assert len({one.fingerprint() for one in (first, *others)}) == 4
    assert all(one.naming(0).scenes != first.naming(0).scenes for one in others)
    assert {Namings("text", 9, attributes=["colour"]).naming(index).attribute for index in range(9)} == {"colour"}
    with pytest.raises(IndexError, match="the source has 3 samples"):
        first.record(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "pairs"}, "kind: 'pairs' is unknown; use interleaved, questions, text"),
        ({"split": "test"}, "split: 'test' is unknown"),
        ({"attributes": ["size"]}, "attributes: 'size' is unknown; use colour, shape"),
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"size": 8}, "size is 8; it must be at least 32"),
        ({"values": 1}, "values is 1; it is from 2 to 4"),
        ({"shots": 3}, "shots is 3; each of the 4 values is shown once at least"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"kind": "questions", "count": 3} | arguments
    with pytest.raises(ValueError, match=message):
        Namings(**given)  # type: ignore[arg-type]


def test_the_task_demonstrates_the_letters_of_its_question_alone() -> None:
    task = LetterNamings(count=6)
    prompts = Prompts(task, Shots(4))
    for example in task.examples:
        shown = prompts.demonstrations(example)
        assert sorted(one.references[0] for one in shown) == sorted(example.options)
        record = prompts.record(example)
        assert len(record.images) == 5
        assert record.messages[-1].text == example.references[0]
        assert len(Prompts(task, Shots(0)).record(example).images) == 1
    with pytest.raises(ValueError, match="5 demonstrations were asked for, and there are 4"):
        Prompts(task, Shots(5))
