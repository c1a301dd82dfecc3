"""Captions with planted faults are found, and whole ones pass."""

from __future__ import annotations

import random

import pytest

from lit_vlm.data.records import RecordError
from lit_vlm.evaluation.captioning.checks import Checks, looped, repeated

WHOLE = [
    "A red bus stands in front of an old brick building.",
    "Two dogs play; one dog is brown and one dog is white, and both run after a red ball on the grass.",
    "It is a very, very, very small bird.",  # three times is a way to speak
    "一只红色的公共汽车停在一栋旧砖楼前面。",
    "Ein Mann – mit Hut – schläft.",
]


@pytest.mark.parametrize("text", WHOLE)
def test_a_whole_caption_passes(text: str) -> None:
    Checks().check(text, cut=False)


@pytest.mark.parametrize(
    ("text", "cut", "reason", "detail"),
    [
        ("", False, "empty_caption", "''"),
        (" ... !", False, "empty_caption", "...!"),
        ("a cat", False, "short_caption", "2 words, --min-words 3"),
        ("a black cat on a mat in the sun", False, "long_caption", "9 words, --max-words 8"),
        ("a black cat on the", True, "cut_caption", "--max-tokens ended it"),
        ("I am sorry, I cannot see it.", False, "refused_caption", "--refuse i (am|'m) sorry"),
        ("a cat and a cat and a cat and a cat", False, "repeated_caption", "62% of its runs of 4 words"),
        ("红色的红色的红色的红色的", False, "repeated_caption", "'红 色 的' 4 times in a row"),
    ],
)
def test_each_fault_has_its_reason(text: str, cut: bool, reason: str, detail: str) -> None:
    checks = Checks(max_words=8, refuse=("i (am|'m) sorry",))
    with pytest.raises(RecordError) as found:
        checks.check(text, cut)
    assert found.value.reason == reason
    assert detail.replace(" ", "") in found.value.detail.replace(" ", "")


def test_a_loop_that_the_last_token_cuts_is_told_as_a_loop() -> None:
    with pytest.raises(RecordError, match="'the sky and' 4 times"):
        Checks().check("a tree under the sky and the sky and the sky and the sky and the", cut=True)


def test_planted_loops_are_found_wherever_they_are_and_no_others() -> None:
    chance = random.Random(0)
    for _ in range(200):
        words = [str(number) for number in chance.sample(range(1000), 40)]  # no word comes twice
        assert not looped(words)
        assert repeated(words) == 0
        size, times, place = chance.randint(1, 8), chance.randint(2, 6), chance.randint(0, 30)
        phrase = [f"loop{number}" for number in range(size)]
        planted = [*words[:place], *phrase * times, *words[place:]]
        assert sorted(looped(planted)) == (sorted(phrase) if times >= 4 else [])


def test_the_share_of_repeated_runs() -> None:
    assert repeated(list("abc")) == 0
    assert repeated(list("abcdabcd")) == pytest.approx(1 / 5)  # of abcd bcda cdab dabc abcd, the last
    sentence = "the man in the red coat walks his dog along the beach"
    with pytest.raises(RecordError, match=r"repeated_caption: 4\d% of its runs of 4 words are repeated"):
        Checks().check(f"{sentence}. {sentence.capitalize()}.", cut=False)
    Checks(max_repeated=0.5).check(f"{sentence}. {sentence}.", cut=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_words": 0}, "--min-words must be at least 1, not 0"),
        ({"max_words": 2}, "--max-words 2 is below --min-words 3"),
        ({"max_repeated": 1.5}, "--max-repeated is a share from 0 to 1"),
        ({"refuse": ("(sorry",)}, r"--refuse \(sorry: is no regular expression"),
    ],
)
def test_checks_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Checks(**arguments)  # type: ignore[arg-type]
