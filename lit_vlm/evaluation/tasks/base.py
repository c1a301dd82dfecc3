"""The interface of a task: its examples, the text that asks them, and the scores of answers."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from lit_vlm.data.records import Image, Message
from lit_vlm.data.records.files import list_files
from lit_vlm.evaluation.metrics import chosen_letter
from lit_vlm.evaluation.metrics.choice import LETTERS

Choosing = Literal["generate", "letter", "option"]


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: unique in its task.
        images: pictures of the question, in order; paths are relative to the task's folder.
        question: the text, without options.
        references: right answers; with options, the text of the right option.
        options: texts to choose from, in the order of their letters.
        group: group of examples that has scores of its own, such as a category.
        turns: the question as a conversation that ends with it, with texts and pictures in an order of their own; the
            prompt then has these in place of `images` and `question`. Empty for most.
        shown: demonstrations of its own, where those of other questions would mean something else. Empty for most.
    """

    id: str
    images: tuple[Image, ...]
    question: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    group: str = ""
    turns: tuple[Message, ...] = ()
    shown: tuple[Example, ...] = ()

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.options.index(self.references[0])]


@dataclass(frozen=True)
class Outcome:
    """A model's answer to one example.

    Attributes:
        example: the question.
        answer: generated text, or the chosen option's letter where options were compared by likelihood.
        nll: negative log-likelihood in nats of the answer or of the example's text, where likelihoods are computed.
        tokens: number of tokens that `nll` sums over.
        left_out: the question could not be asked, so that its answer is wrong.
    """

    example: Example
    answer: str
    nll: float = 0.0
    tokens: int = 0
    left_out: bool = False

    @property
    def right(self) -> bool:
        """Whether the chosen option has the text of a right one; two options may have the same text."""
        letter = "" if self.left_out else chosen_letter(self.answer, self.example.options)
        return letter != "" and self.example.options[LETTERS.index(letter)] in self.example.references


class Task(ABC):
    """A benchmark in its official files.

    Args:
        folder: folder of the files.

    Attributes:
        name: name on the command line.
        about: one line about the task, for `--help`.
        files: names of the files that it reads, and where to get them.
        instruction: line that follows every question (LLaVA-1.5's evaluation).
        max_new_tokens: length of an answer at most.
        main: name of the score that stands for the task.
        averaged: name of the score that is 100 × the mean over questions of `score_of`; "" where none is.
        lower: names of scores of which a lower value is the better one.
        choosing: how one of several options is chosen: the model writes its letter (`generate`), or the likeliest
            letter or text of an option counts.
        lists_options: whether the question is followed by its options with their letters.
        split: the split that is evaluated, as the benchmark's files call it.
        demonstration_split: the split that demonstrations are taken from; "" where there is none.
        same_group: whether demonstrations are of the example's group.
        needs_files: whether the task reads the files of a folder.
        perplexity: whether the likelihood of the examples' text is measured, and no question is asked.

    Raises:
        ValueError: when there is no such folder.
    """

    name: str
    main: str = "accuracy"
    averaged: str = ""
    lower: ClassVar[tuple[str, ...]] = ()
    about: ClassVar[str]
    files: ClassVar[str]
    instruction: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 16
    choosing: ClassVar[Choosing] = "generate"
    lists_options: ClassVar[bool] = True
    split: ClassVar[str] = "test"
    demonstration_split: ClassVar[str] = ""
    same_group: ClassVar[bool] = False
    needs_files: ClassVar[bool] = True
    perplexity: ClassVar[bool] = False

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ValueError(f"task {self.name}: there is no folder {self.folder}. It holds {self.files}")

    @cached_property
    def examples(self) -> Sequence[Example]:
        """All questions, in the order of the files.

        Raises:
            ValueError: where there are none, one has no answer, an id stands twice, or as `read`.
        """
        found = self.read(self.split)
        if not found:
            raise ValueError(f"task {self.name}: the files in {self.folder} hold no question. They are {self.files}")
        if unanswered := [one.id for one in found if not one.references and not self.perplexity]:
            raise ValueError(
                f"task {self.name}: {len(unanswered)} questions in {self.folder} have no answer, first "
                f"{unanswered[0]}: is that a test split, whose answers are not given out? It reads {self.files}"
            )
        twice = [name for name, count in Counter(one.id for one in found).items() if count > 1]
        if twice:
            raise ValueError(
                f"task {self.name}: {len(twice)} ids stand more than once in {self.folder}, first {twice[0]}: does it "
                "hold the same table twice?"
            )
        return found

    @cached_property
    def demonstrations(self) -> Sequence[Example]:
        """Solved examples for few-shot prompts, of another split.

        Raises:
            ValueError: where the benchmark has none, or as `read`.
        """
        if not self.demonstration_split:
            raise ValueError(f"task {self.name} has no split to take demonstrations from: use --shots 0")
        return self.read(self.demonstration_split)

    @abstractmethod
    def read(self, split: str) -> Sequence[Example]:
        """Read the questions of a split.

        Raises:
            ValueError: for a missing or wrong file, naming the file, and the field that is wrong.
        """

    @abstractmethod
    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Scores by name, in the unit that papers print; `main` is among them."""

    def score_of(self, outcome: Outcome) -> float | None:
        """The score of one question, from 0 to 1, by which runs can be compared question by question.

        None where a question has no score of its own.
        """
        return None

    def ask(self, example: Example) -> str:
        """The text of the question as the model reads it: with its options by letter, and the instruction."""
        lines = [example.question]
        if self.lists_options:
            lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, example.options, strict=False)]
        if self.instruction:
            lines.append(self.instruction)
        return "\n".join(lines)

    def solve(self, example: Example) -> str:
        """The answer that a demonstration gives."""
        return example.letter if example.options else example.references[0]

    def unit(self, example: Example) -> str:
        """Name of the examples that are scored together; `limit` takes all examples of a unit or none."""
        return example.id

    # ------------------------------------------------------------------ files

    def path(self, *names: str) -> Path:
        """A file of the folder: the first of the names that exists; raises ValueError if none does."""
        for name in names:
            if (self.folder / name).exists():
                return self.folder / name
        raise ValueError(f"task {self.name} needs {self.folder / names[0]}. It reads {self.files}")

    def paths(self, *suffixes: str) -> list[Path]:
        """All files of the folder, at any depth, with these suffixes; raises ValueError if there is none."""
        try:
            return list_files(self.folder, suffixes, links=True)
        except ValueError as error:
            raise ValueError(f"task {self.name}: {error}. It reads {self.files}") from error

    def json(self, *names: str) -> Any:
        """The content of a JSON file; raises ValueError naming the file."""
        path = self.path(*names)
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"task {self.name}: {path} is not JSON: {error}") from error

    def listed(self, name: str) -> list[Any]:
        """The content of a JSON file that is a list; raises ValueError naming the file."""
        content = self.json(name)
        if not isinstance(content, list):
            raise ValueError(f"task {self.name}: {self.path(name)} must be a list, found {type(content).__name__}")
        return content

    def field(self, entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
        """A field of an entry; raises ValueError naming the place `where`, the field and the expected type."""
        if not isinstance(entry, Mapping) or key not in entry or not isinstance(entry[key], kind):
            found = "nothing" if not isinstance(entry, Mapping) or key not in entry else repr(entry[key])[:60]
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(one.__name__ for one in kinds)
            raise ValueError(f"task {self.name}: {where}: field '{key}' must be {wanted}, found {found}")
        return entry[key]


def choice_accuracy(outcomes: Sequence[Outcome], by_group: str = "") -> dict[str, float]:
    """Share of right choices in percent, over all and of each group.

    Args:
        outcomes: outcomes of examples with options.
        by_group: word for groups in the names of scores, `WORD/GROUP`; "" leaves groups out.
    """
    right = [one.right for one in outcomes]
    scores = {"accuracy": 100 * sum(right) / max(1, len(right))}
    for group in sorted({one.example.group for one in outcomes}) if by_group else ():
        own = [ok for ok, one in zip(right, outcomes, strict=True) if one.example.group == group]
        scores[f"{by_group}/{group}"] = 100 * sum(own) / len(own)
    return scores
