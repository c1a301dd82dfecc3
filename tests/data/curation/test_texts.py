"""The step that looks at texts: which text, exact limits, languages, patterns, repetition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_vlm.data.curation import Text
from lit_vlm.data.curation.texts import learned_text, repetition
from lit_vlm.data.records import Message, Record
from lit_vlm.data.records import Text as Piece
from lit_vlm.data.sources import ChatJsonl
from tests.data.curation.planted import verdict_of


def chat(folder: Path, *pairs: tuple[str, str]) -> ChatJsonl:
    rows = []
    for index, (question, answer) in enumerate(pairs):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": index, "messages": turns}))
    (folder / "chat.jsonl").write_text("\n".join(rows))
    return ChatJsonl(str(folder / "chat.jsonl"))


def dropped(step: Text, folder: Path, *answers: str) -> dict[str, str]:
    return verdict_of(step, chat(folder, *(("What?", answer) for answer in answers)), folder / "m")[0]


def test_what_is_trained_on_is_measured() -> None:
    turns = (
        Message("system", (Piece("be kind"),)),
        Message("user", (Piece("what is it"), Piece("this too", loss=True))),
        Message("assistant", (Piece("a dog"), Piece("not this", loss=False))),
    )
    assert learned_text(Record("r", "s", turns)) == "this too a dog"


def test_limits_of_lengths_are_met_exactly(tmp_path: Path) -> None:
    words = ["one", "one two", "one two three", "one two three four"]
    assert dropped(Text(min_words=2, max_words=3), tmp_path, *words) == {"0": "min_words", "3": "max_words"}
    letters = ["ab", "abc", "abcd", " abcde "]
    step = Text(min_characters=3, max_characters=4)
    assert dropped(step, tmp_path, *letters) == {"0": "min_characters", "3": "max_characters"}


def test_other_languages_are_dropped_and_named(tmp_path: Path) -> None:
    answers = (
        "The quick brown fox jumps over the lazy dog near the river.",
        "Der schnelle braune Fuchs springt über den faulen Hund am Fluss.",
        "敏捷的棕色狐狸跳过了河边的懒狗。",
        "Le renard brun saute par-dessus le chien paresseux près de la rivière.",
        "2024-01-01 12:30",
    )
    source = chat(tmp_path, *(("Was ist das auf diesem Bild hier?", answer) for answer in answers))
    found, verdict = verdict_of(Text(languages=["en", "fr"]), source, tmp_path / "m")
    assert found == {"1": "languages", "2": "languages", "4": "languages"}
    assert dict(verdict.details) == {1: "de", 2: "zh", 4: ""}
    assert verdict.values[4] == 0
    sure, verdict = verdict_of(Text(languages=["en", "fr"], min_probability=1.01), source, tmp_path / "m")
    assert sure == found | {"0": "min_probability", "3": "min_probability"}
    assert verdict.details[3] == "fr"


def test_blocked_patterns_are_found_in_questions_too_and_named(tmp_path: Path) -> None:
    source = chat(tmp_path, ("What?", "a dog"), ("Lorem Ipsum?", "yes"), ("What?", "see http://x.org"), ("Why?", "no"))
    step = Text(blocked=[r"https?://", "(?i)lorem ipsum"])
    found, verdict = verdict_of(step, source, tmp_path / "m")
    assert found == {"1": "blocked", "2": "blocked"}
    assert dict(verdict.details) == {1: "(?i)lorem ipsum", 2: "https?://"}


def test_repetition_is_the_share_of_sequences_that_occurred_before(tmp_path: Path) -> None:
    assert repetition(["a", "b", "c"]) == 0
    assert repetition(["a", "b", "c", "d", "e", "f", "g"]) == 0
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 - 4 / 5)
    assert repetition(["buy"] * 13) == pytest.approx(1 - 1 / 10)
    answers = ("a b c d e f", "a b c d a b c d", "buy " * 13)
    assert dropped(Text(max_repetition=0.2), tmp_path, *answers) == {"2": "max_repetition"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "it drops nothing: set min_words or"),
        ({"languages": ["en", "klingon"]}, r"languages names \['klingon'\]; known are af, "),
        ({"min_probability": 0.5, "min_words": 1}, "set languages, too"),
        ({"blocked": ["(unclosed"]}, r"blocked: '\(unclosed' is no regular expression"),
    ],
)
def test_steps_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Text(**settings)
