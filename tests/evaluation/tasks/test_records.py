"""Questions of one's own: what a file of records becomes, how it is scored, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from lit_vlm.data.records import Image, Text
from lit_vlm.evaluation.tasks import Outcome, Prompts, RecordFile, Scoring, Shots


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asked(question: str, *answers: str, **more: Any) -> dict[str, Any]:
    return {"messages": [user(question)], "answers": list(answers)} | more


def written(file: Path, *records: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    PILImage.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    return tmp_path / "mine.jsonl"


def test_a_question_is_put_as_it_is_written(file: Path) -> None:
    record = {
        "id": 7,
        "messages": [
            {"role": "system", "content": "Be brief."},
            user("Ready?"),
            assistant("Yes."),
            user(
                [
                    {"type": "text", "text": "Is "},
                    {"type": "image", "image": "images/a.png"},
                    {"type": "text", "text": " red?"},
                ]
            ),
            assistant("no"),
        ],
    }  # fmt: skip
    task = RecordFile(written(file, record, asked("And?", "x")))
    assert (task.name, task.scoring) == ("mine", "exact")
    example = task.examples[0]
    assert (example.id, example.references) == ("7", ("no",))
    messages = Prompts(task, Shots()).record(example).messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3].content == (Text("Is "), Image(path=str(file.parent / "images" / "a.png")), Text(" red?"))
    other = Prompts(task, Shots(system="Think.")).record(example).messages
    assert (other[0].text, [message.role for message in other].count("system")) == ("Think.", 1)


def test_options_are_compared_as_texts_or_listed_by_letter(file: Path) -> None:
    task = RecordFile(written(file, asked("Colour?", "red", options=["blue", "red"])))
    assert (task.scoring, task.main) == ("choice", "choice")
    record = Prompts(task, Shots()).record(task.examples[0])
    assert (record.messages[0].text, record.options) == ("Colour?", ("blue", "red"))
    lettered = Prompts(task, Shots(), "generate").record(task.examples[0])
    assert lettered.messages[0].text.startswith("Colour?\nA. blue\nB. red\nAnswer with the option's letter")
    assert (lettered.messages[1].text, lettered.options) == ("B", ())
    plain = RecordFile(str(file), "exact")
    assert plain.examples[0].options == ()
    with pytest.raises(ValueError, match="task mine has no options to choose from: leave --choose out"):
        Prompts(plain, Shots(), "letter")


def test_demonstrations_are_the_other_questions_or_those_of_another_file(file: Path) -> None:
    task = RecordFile(written(file, *(asked(f"<image>{n}?", f"{n}", images=["images/a.png"]) for n in range(4))))
    prompts = Prompts(task, Shots(3))
    for example in task.examples:
        shown = prompts.demonstrations(example)
        assert {one.id for one in shown} == {one.id for one in task.examples} - {example.id}
    record = prompts.record(task.examples[0])
    assert [sum(isinstance(part, Image) for part in one.content) for one in record.messages[::2]] == [1, 1, 1, 1]
    without = Prompts(task, Shots(text_shots=2)).record(task.examples[0])
    assert [sum(isinstance(part, Image) for part in one.content) for one in without.messages[::2]] == [0, 0, 1]
    with pytest.raises(ValueError, match="4 demonstrations were asked for, and there are 3"):
        Prompts(task, Shots(4))
    solved = written(file.parent / "other" / "solved.jsonl", asked("One?", "1"), asked("Two?", "2"))
    another = Prompts(RecordFile(str(file), demonstrations=solved), Shots(2))
    # Without ids of their own both files count from 0: question 0 is still shown the other file's 0.
    assert {one.question for one in another.demonstrations(another.task.examples[0])} == {"One?", "Two?"}


@pytest.mark.parametrize(
    ("scoring", "references", "answer", "score"),
    [
        ("exact", ("four", "4"), "The 4.", 1.0),  # without articles and marks
        ("exact", ("four",), "five", 0.0),
        ("vqa", ("two", "2", "2", "3"), "two", (3 * 2 / 3 + 1) / 4),  # 3 of 4 match; each left out in turn
        ("anls", ("hello",), "hallo", 0.8),  # one of five letters
        ("anls", ("hello",), "help me", 0.0),  # below a half
        ("relaxed", ("100", "7"), "104.9", 1.0),
        ("relaxed", ("100",), "106", 0.0),
        ("f1", ("red box", "a red box on top"), "red box on top now", 8 / 9),  # 4 words of 5, of 4
    ],
)
def test_each_score_by_hand(
    scoring: Scoring, references: tuple[str, ...], answer: str, score: float, file: Path
) -> None:
    task = RecordFile(written(file, asked("?", *references)), scoring)
    outcome = Outcome(task.examples[0], answer)
    assert task.score_of(outcome) == pytest.approx(score)
    assert task.score([outcome]) == {scoring: pytest.approx(100 * score)}
    assert task.score_of(Outcome(task.examples[0], answer, left_out=True)) == 0


def test_kinds_have_scores_of_their_own_and_any_right_option_counts(file: Path) -> None:
    records = [asked("1", "a", "b", kind="x"), asked("2", "c", kind="x"), asked("3", "a")]
    task = RecordFile(written(file, *(record | {"options": ["a", "b", "c"]} for record in records)))
    found = [Outcome(example, letter) for example, letter in zip(task.examples, "BAA", strict=True)]
    assert task.score(found) == {"choice": pytest.approx(200 / 3), "kind/x": 50.0}
    assert [task.score_of(one) for one in found] == [1, 0, 1]


WRONG: dict[str, tuple[list[Any], Scoring | None, str]] = {
    "no answer": ([asked("?")], None, "line 1 has no answer: add a list 'answers', or end its messages"),
    "a number": ([asked("?", "4") | {"answers": [4]}], None, r"line 1: 'answers' is '\[4\]'; it is a list of strings"),
    "kind": ([asked("?", "4", kind=3)], None, "line 1: 'kind' is 3; it is a string"),
    "picture": (
        [asked("?", "4"), asked("<image>?", "4", images=["b.png"])],
        None,
        "line 2: .*/b.png does not exist",
    ),
    "long name": ([asked("<image>?", "4", images=["iVBORw0KGgo" * 30])], None, "line 1: .*iVBOR.* is no path"),
    "longer name": ([asked("<image>?", "4", images=["a/" * 5000])], None, "line 1: .* is no path"),
    "null": ([asked("<image>?", "4", images=["a\0b.png"])], None, "line 1: .* is no path: .*null"),
    "half a path": ([asked("<image>?", "4", images=["\ud83d.png"])], None, "line 1: .* is no path: .*surrogates"),
    "half a question": ([asked("\ud83d?", "4")], None, "line 1: its text holds half a character"),
    "half an answer": ([asked("?", "4", "\ud83d")], None, "line 1: 'answers' holds half a character: .*surrogates"),
    "half a kind": ([asked("?", "4", kind="\ud83d")], None, "line 1: 'kind' holds half a character: .*surrogates"),
    "an empty answer": (
        [asked("?", "", "yes")],
        None,
        "line 1: 'answers' has an empty one, for which no answer at all",
    ),
    "marks": ([asked("<image>?", "4")], None, "line 1: 1 <image> marks in the text .* 0 pictures in 'images'"),
    "twice": ([asked("?", "4", id="a"), asked("?", "5", id="a")], None, "line 2: 'id' 'a' is that of .*line 1 too"),
    "turns": ([{"messages": [assistant("4")]}], None, "line 1: its turns are assistant; a question is of user"),
    "document": (
        [asked("?", "4"), {"messages": [{"role": "document", "content": "x"}], "answers": ["4"]}],
        None,
        "line 2: its turns are document",
    ),
    "mixed": (
        [asked("?", "4", options=["4", "5"]), asked("?", "4")],
        None,
        "1 of 2 records have options, and that of .*line 2 has none: name a --score",
    ),
    "option": ([asked("?", "6", options=["4", "5"])], None, "line 1: the right answer '6' is none of 'options': 4, 5"),
    "no options": ([asked("?", "6")], "choice", "line 1: --score choice needs a list 'options' in every record"),
    "too many": (
        [asked("?", "1", options=[str(n) for n in range(27)])],
        None,
        "line 1: 'options' are 27, and at most 26",
    ),
    "no record": ([], None, "holds no record"),
    "a word": (["why"], None, "line 1: a record is an object with a non-empty list 'messages'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_line(case: str, file: Path) -> None:
    records, scoring, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        _ = RecordFile(written(file, *records), scoring).examples


def test_records_without_ids_get_such_as_no_other_has(file: Path) -> None:
    records = [
        asked("0?", "x", id="1"),
        asked("1?", "x"),
        asked("2?", "x"),
        asked("3?", "x", id="#1"),
        asked("4?", "x"),
    ]
    found = RecordFile(written(file, *records)).examples
    assert [(one.id, one.question) for one in found] == [
        ("1", "0?"), ("##1", "1?"), ("2", "2?"), ("#1", "3?"), ("4", "4?"),
    ]  # fmt: skip


def test_a_mark_in_front_of_the_text_is_no_part_of_it(file: Path) -> None:
    for name, text in (("a.jsonl", json.dumps(asked("?", "4"))), ("a.json", json.dumps([asked("?", "4")]))):
        (file.parent / name).write_text(text, encoding="utf-8-sig")
        assert len(RecordFile(str(file.parent / name)).examples) == 1


def test_files_that_are_none(file: Path) -> None:
    with pytest.raises(ValueError, match=r"mine.jsonl is not there; questions of one's own are a .jsonl file"):
        RecordFile(str(file))
    with pytest.raises(ValueError, match="is a folder"):
        RecordFile(str(file.parent))
    file.write_text('{"messages": []}\n{"messages": [')
    with pytest.raises(ValueError, match="mine.jsonl line 1: "):
        RecordFile(str(file))
    file.write_text(json.dumps(asked("?", "4")) + "\n\n{")
    with pytest.raises(ValueError, match="mine.jsonl line 3 is not JSON"):
        RecordFile(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="mine.jsonl is not UTF-8"):
        RecordFile(str(file))
    listed = file.with_suffix(".json")
    listed.write_text(json.dumps([asked("?", "4"), asked("?")]))
    with pytest.raises(ValueError, match="mine.json entry 1 has no answer"):
        RecordFile(str(listed))
