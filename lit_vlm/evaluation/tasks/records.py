"""Questions of one's own: a file of records, with a score by name."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_vlm.data.records import Image, Record, RecordError
from lit_vlm.data.records.parsing import parse_record
from lit_vlm.data.records.pictures import image_file
from lit_vlm.evaluation.held_out_records import absolute_paths
from lit_vlm.evaluation.metrics import ANLS, ExactMatch, MeanScore, RelaxedAccuracy, TokenF1, VQAAccuracy
from lit_vlm.evaluation.metrics.choice import LETTERS
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task
from lit_vlm.evaluation.tasks.choice import LETTER

Scoring = Literal["exact", "vqa", "choice", "anls", "relaxed", "f1"]
METRICS: dict[Scoring, type[MeanScore]] = {
    "exact": ExactMatch,
    "vqa": VQAAccuracy,
    "anls": ANLS,
    "relaxed": RelaxedAccuracy,
    "f1": TokenF1,
}


class _Row(NamedTuple):
    """A record with what only its score needs, and the place that it was read from."""

    record: Record
    answers: tuple[str, ...]
    kind: str
    where: str


class RecordFile(Task):
    """Questions of a file in the kit's record form; the task is called after the file.

    The question is all that stands before the last answer, as it is written. Right answers are the list `answers`, or
    without it the last turn of the assistant. Records may name a `kind`, whose questions then get a score of their own.

    Args:
        file: .jsonl with a record per line, or .json with a list of them; pictures are found from its folder.
        scoring: how answers are scored; None: `choice` where records have options, else `exact`.
        demonstrations: file of records that demonstrations are taken from; default: the others of `file`.

    Raises:
        ValueError: for a missing file, or a record that is wrong, with its line and key.
    """

    name = "file"
    about = "questions of one's own, by --file"
    files = "records as docs/data.md describes them, one per line"
    max_new_tokens = 32
    choosing = "option"
    needs_files = False  # it is made of a file, not of a folder
    split = "file"
    demonstration_split = "demonstrations"

    def __init__(self, file: str, scoring: Scoring | None = None, demonstrations: str | None = None) -> None:
        self.file = _existing(file)
        super().__init__(str(self.file.parent))
        self.name = self.file.stem
        self._solved = _existing(demonstrations) if demonstrations else self.file
        self._rows = _read(self.file)
        self.scoring = scoring or self._default()
        self.main = self.averaged = self.scoring

    def read(self, split: str) -> Sequence[Example]:
        """The questions, or the demonstrations; raises as `Task.read` does."""
        if split == self.split:
            return [self._example(row, row.record.id) for row in self._rows]
        if self._solved.resolve() == self.file.resolve():
            return self.examples
        # An id of another file may by chance be that of a question.
        return [self._example(row, f"{self._solved}:{row.record.id}") for row in _read(self._solved)]

    def ask(self, example: Example) -> str:
        """The question, with its options by letter where it has some, and then what is asked of these."""
        return super().ask(example) + (f"\n{LETTER}" if example.options else "")

    def score_of(self, outcome: Outcome) -> float:
        """The score by its name, from 0 to 1."""
        if self.scoring == "choice":
            return float(outcome.right)
        if outcome.left_out:
            return 0.0
        return METRICS[self.scoring].of(outcome.answer, outcome.example.references)

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """The score in percent, over all questions and of each kind."""
        groups: dict[str, list[float]] = {}
        own = [self.score_of(one) for one in outcomes]
        for one, value in zip(outcomes, own, strict=True):
            groups.setdefault(one.example.group, []).append(value)
        scores = {self.main: 100 * sum(own) / len(own)}
        return scores | {f"kind/{name}": 100 * sum(own) / len(own) for name, own in sorted(groups.items()) if name}

    def _default(self) -> Scoring:
        with_options = [row for row in self._rows if row.record.options]
        if with_options and len(with_options) < len(self._rows):
            without = next(row for row in self._rows if not row.record.options)
            raise ValueError(
                f"{self.file}: {len(with_options)} of {len(self._rows)} records have options, and that of "
                f"{without.where} has none: name a --score for all, such as --score exact, or make two files of them"
            )
        return "choice" if with_options else "exact"

    def _example(self, row: _Row, key: str) -> Example:
        record = row.record
        turns = record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
        question = turns[-1].text.strip()
        options = _options(row) if self.scoring == "choice" else ()
        images = tuple(part for turn in turns for part in turn.content if isinstance(part, Image))
        return Example(key, images, question, row.answers, options, row.kind, turns)


def _existing(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"{file} is {what}; questions of one's own are a .jsonl file with a record per line")
    return path


def _options(row: _Row) -> tuple[str, ...]:
    options = row.record.options
    if not options:
        raise ValueError(f"{row.where}: --score choice needs a list 'options' in every record, and this has none")
    if len(options) > len(LETTERS):
        raise ValueError(f"{row.where}: 'options' are {len(options)}, and at most {len(LETTERS)} can be asked")
    if wrong := [answer for answer in row.answers if answer not in options]:
        raise ValueError(f"{row.where}: the right answer {wrong[0]!r} is none of 'options': {', '.join(options)[:200]}")
    return options


def _read(file: Path) -> list[_Row]:
    """The records of a file.

    Raises:
        ValueError: for a record that cannot be asked, with its place and what is wrong.
    """
    found = []
    places: dict[str, str] = {}
    unnamed = set()
    for number, (where, raw) in enumerate(_rows(file)):
        try:
            record = parse_record(raw, file.stem, str(number), links=True)
            for image in record.images:
                if image.path is not None:
                    image_file(Image(path=str(file.absolute().parent / image.path)), Path("/"))
        except RecordError as error:
            raise ValueError(f"{where}: {error.detail}") from error
        row = _Row(absolute_paths(record, file.parent), _answers(raw, record, where), _kind(raw, where), where)
        _check_turns(record, where)
        if raw.get("id") is None:
            unnamed.add(number)
        elif record.id in places:
            raise ValueError(f"{where}: 'id' {record.id!r} is that of {places[record.id]} too; each has one of its own")
        else:
            places[record.id] = where
        found.append(row)
    if not found:
        raise ValueError(f"{file} holds no record")
    return [_named(row, number, places) if number in unnamed else row for number, row in enumerate(found)]


def _named(row: _Row, number: int, taken: Container[str]) -> _Row:
    """A record that has no id of its own, with its number for one, behind marks if another record is called that."""
    name = str(number)
    while name in taken:
        name = f"#{name}"
    return row._replace(record=replace(row.record, id=name))


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each line, or of each entry of a list.

    Raises:
        ValueError: where one is not JSON.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # some programs mark the beginning
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_json(text, str(file))):
            yield f"{file} entry {number}", entry
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file} line {number}", _json(line, f"{file} line {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _answers(raw: Any, record: Record, where: str) -> tuple[str, ...]:
    last = record.messages[-1]
    given = raw.get("answers")
    if given is None:
        given = [last.text] if last.role == "assistant" else []
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
        raise ValueError(f'{where}: \'answers\' is {str(given)[:80]!r}; it is a list of strings, such as ["4", "four"]')
    if not given or not any(answer.strip() for answer in given):
        raise ValueError(f"{where} has no answer: add a list 'answers', or end its messages with one of the assistant")
    if not all(answer.strip() for answer in given):
        raise ValueError(f"{where}: 'answers' has an empty one, for which no answer at all would be right: remove it")
    _check_letters("answers", given, where)
    return tuple(given)


def _check_letters(key: str, texts: Sequence[str], where: str) -> None:
    """Refuse half a surrogate pair, which no file takes, before the first question is asked."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: '{key}' holds half a character: {error}") from error


def _kind(raw: Any, where: str) -> str:
    kind = raw.get("kind")
    if not isinstance(kind, str | None):
        raise ValueError(f"{where}: 'kind' is {kind!r}; it is a string, the kind of question")
    _check_letters("kind", [kind or ""], where)
    return kind or ""


def _check_turns(record: Record, where: str) -> None:
    """Refuse turns that are no question; raises ValueError with their place."""
    roles = [message.role for message in record.messages]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk and talk[-1] == "assistant":
        talk = talk[:-1]
    if not talk or talk != [("user", "assistant")[number % 2] for number in range(len(talk))] or talk[-1] != "user":
        raise ValueError(
            f"{where}: its turns are {', '.join(roles)}; a question is of user, with user and assistant in turn before "
            "it, and its answer behind it or under 'answers'"
        )
