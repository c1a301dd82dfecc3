"""Letters and words for what is seen: what a document tells, recomputed from what its pictures show."""

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
        named = dict(zip(values, naming.names, strict=True))
        assert [named[value] for value in values] == list(naming.names)
        assert len(set(named.values())) == len(named) == 4
        assert set(values[:-1]) == set(values)
        assert sorted(naming.options) == sorted(named.values())
        assert set(naming.options) <= set(LETTERS)


def test_nothing_but_the_document_tells_a_letter() -> None:
    source = Namings("questions", 2000)
    namings = [source.naming(index) for index in range(2000)]
    asked = Counter((getattr(one.scenes[-1].things[0].look, one.attribute), one.names[-1]) for one in namings)
    assert max(asked.values()) <= 30  # 1000 questions about four shapes and 20 letters: 12.5 of each on average
    places = Counter(one.names[:-1].index(one.names[-1]) for one in namings)
    assert all(430 < places[place] < 570 for place in range(4))
    assert all(430 < count < 570 for count in Counter(one.options.index(one.names[-1]) for one in namings).values())
    assert {one.attribute for one in namings} == set(ATTRIBUTES)


@pytest.mark.parametrize("shots", [0, 4])
def test_a_word_is_the_colour_or_the_shape_of_its_thing_and_demonstrations_tell_which(shots: int) -> None:
    source = Namings("questions", 2000, shots=shots, names="words")
    namings = [source.naming(index) for index in range(2000)]
    for naming in namings:
        looks = [scene.things[0].look for scene in naming.scenes]
        assert all(len(scene.things) == 1 for scene in naming.scenes)
        assert naming.names == tuple(getattr(look, naming.attribute) for look in looks)
        assert len(looks) == shots + 1
        for attribute, values in ATTRIBUTES.items():
            offered = [option for option in naming.options if option in values]
            assert len(set(offered)) == 2  # so who knows the attribute alone is right half the time
            assert getattr(looks[-1], attribute) in offered  # and who knows the thing alone
        assert len(naming.options) == 4
    assert Counter(one.attribute for one in namings) == {"colour": 1000, "shape": 1000}
    assert all(430 < count < 570 for count in Counter(one.options.index(one.names[-1]) for one in namings).values())


@pytest.mark.parametrize("kind", ["interleaved", "text"])
def test_no_sentence_tells_whether_a_colour_or_a_shape_is_asked_for(kind: Kind) -> None:
    source = Namings(kind, 200, names="words")
    forms: dict[str, Counter[str]] = {attribute: Counter() for attribute in ATTRIBUTES}
    for index in range(200):
        naming, (message,) = source.naming(index), source.outline(index).messages
        said = [one.text for one in message.content if isinstance(one, Text)]
        said = said[1::2] if kind == "text" else said
        assert all(one.strip().endswith(name) for one, name in zip(said, naming.names, strict=True))
        forms[naming.attribute].update(
            {one.strip().removesuffix(name) for one, name in zip(said, naming.names, strict=True)}
        )
    assert set(forms["colour"]) == set(forms["shape"]) == {"", "Question: What is this?\nAnswer: "}
    assert all(35 < count < 65 for counts in forms.values() for count in counts.values())


@pytest.mark.parametrize("kind", get_args(Kind))
def test_records_show_the_things_that_are_named(kind: Kind) -> None:
    source = Namings(kind, 8, size=48)
    for index in range(8):
        record, naming = source.record(index), source.naming(index)
        assert source.outline(index).messages[-1].text == record.messages[-1].text
        text = "".join(message.text for message in record.messages)
        assert tuple(GIVEN.findall(text)) == naming.names
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
        bare += said == list(naming.names)
    assert 80 < bare < 120


def test_splits_and_seeds_differ_and_arguments_decide_everything() -> None:
    first = Namings("questions", 3)
    assert first.record(2).messages[1].text == Namings("questions", 9).record(2).messages[1].text
    others = [
        Namings("questions", 3, seed=1),
        Namings("questions", 3, split="held_out"),
        Namings("questions", 3, shots=5),
        Namings("questions", 3, names="words"),
    ]
    assert len({one.fingerprint() for one in (first, *others)}) == 5
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
        ({"names": "numbers"}, "names: 'numbers' is unknown; use letters, words"),
        ({"names": "words", "shots": -1}, "shots is -1; it must be at least 0"),
        ({"names": "words", "values": 4}, "values is 4 with names 'words'; letters alone have values"),
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
