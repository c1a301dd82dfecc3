"""Made-up words: what a document tells, recomputed from what its pictures show."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest

from lit_vlm.data.records import open_image
from lit_vlm.evaluation.tasks import MadeUpWords, Prompts, Shots
from lit_vlm.worlds.namings import ATTRIBUTES, WORDS, Kind, Namings
from lit_vlm.worlds.scenes import render


@pytest.mark.parametrize("shots", [4, 7])
def test_a_word_stands_for_one_value_of_a_document_and_is_said_before_it_is_asked(shots: int) -> None:
    source = Namings("questions", 60, shots=shots)
    for index in range(60):
        naming = source.naming(index)
        values = [getattr(scene.things[0].look, naming.attribute) for scene in naming.scenes]
        assert all(len(scene.things) == 1 for scene in naming.scenes)
        named = dict(zip(values, naming.words, strict=True))
        assert [named[value] for value in values] == list(naming.words)
        assert len(set(named.values())) == len(named) == 4
        assert set(values[:-1]) == set(values)
        assert sorted(naming.options) == sorted(named.values())
        assert set(naming.options) <= set(WORDS)


def test_nothing_but_the_document_tells_a_word() -> None:
    source = Namings("questions", 2000)
    namings = [source.naming(index) for index in range(2000)]
    asked = Counter((getattr(one.scenes[-1].things[0].look, one.attribute), one.words[-1]) for one in namings)
    assert max(asked.values()) <= 12  # 1000 questions about four shapes and 70 words: 3.6 of each on average
    places = Counter(one.words[:-1].index(one.words[-1]) for one in namings)
    assert all(430 < places[place] < 570 for place in range(4))
    assert all(430 < count < 570 for count in Counter(one.options.index(one.words[-1]) for one in namings).values())
    assert {one.attribute for one in namings} == set(ATTRIBUTES)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_records_show_the_things_that_are_named(kind: Kind) -> None:
    source = Namings(kind, 8, size=48)
    for index in range(8):
        record, naming = source.record(index), source.naming(index)
        assert source.outline(index).messages[-1].text == record.messages[-1].text
        text = "".join(message.text for message in record.messages)
        assert all(text.count(word) >= naming.words.count(word) for word in naming.words)
        if kind == "text":
            assert not record.images
            assert all(scene.things[0].look.colour in text for scene in naming.scenes)
        else:
            for image, scene in zip(record.images, naming.scenes, strict=True):
                assert np.array_equal(np.asarray(open_image(image, source.image_folder)), render(scene, 48).image)
        assert record.options == (naming.options if kind == "questions" else ())


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


def test_the_task_demonstrates_the_words_of_its_question_alone() -> None:
    task = MadeUpWords(count=6)
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
