"""Multiple choice about pictures: ScienceQA, MMBench, SEED, MMMU, CV-Bench, MMStar, AI2D."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from lit_vlm.data.records import Image
from lit_vlm.data.records.files import visible
from lit_vlm.evaluation.metrics.choice import LETTERS
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task, choice_accuracy

LETTER = "Answer with the option's letter from the given choices directly."
UNLISTED = tuple(LETTERS[:4])
"""Options of a question whose text does not list them: the letters themselves."""


class MultipleChoice(Task):
    """Options by letter; the score is the share of right ones in percent."""

    instruction = LETTER
    max_new_tokens = 8
    averaged = "accuracy"
    groups: ClassVar[str] = "group"
    """Word for groups of questions in the names of scores."""

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Accuracy in percent, over all questions and of each group."""
        return choice_accuracy(outcomes, self.groups)

    def score_of(self, outcome: Outcome) -> float:
        """1 for a right choice, else 0."""
        return float(outcome.right)

    def rows(self, *names: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows of all Parquet files in the folder whose file names contain one of `names`, each with its place.

        Raises:
            ValueError: when there is none, or a file is no Parquet file.
        """
        import pyarrow.parquet as pq  # takes 0.3 s to import, and few processes read tables

        files = [file for file in self.paths(".parquet") if any(name in file.name for name in names)]
        if not files:
            raise ValueError(f"task {self.name}: {self.folder} has no {names[0]}*.parquet. It reads {self.files}")
        for file in files:
            try:
                table = pq.read_table(file).to_pylist()
            except (OSError, ValueError) as error:  # all errors of pyarrow are one of these
                raise ValueError(f"task {self.name}: {file} is no parquet file: {error}") from error
            for number, row in enumerate(table):
                yield f"{file.name} row {number}", row

    def picture(self, value: Any, where: str) -> Image:
        """A picture from a cell of Hugging Face's tables, bytes or `{bytes, path}`; raises ValueError without bytes."""
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"task {self.name}: {where}: the picture has no bytes")
        return Image(data=data)

    def by_letter(self, options: Sequence[str], letter: str, where: str) -> str:
        """The option that a letter names; raises ValueError where there is none."""
        bare = letter.strip().strip("()").upper()
        if len(bare) != 1 or bare not in LETTERS[: len(options)]:
            raise ValueError(f"task {self.name}: {where}: answer {letter!r} is none of {len(options)} options")
        return options[LETTERS.index(bare)]

    def by_place(self, options: Sequence[str], place: int, where: str) -> str:
        """The option at a place, counted from 0; raises ValueError where there is none."""
        if not 0 <= place < len(options):
            raise ValueError(f"task {self.name}: {where}: answer {place} is none of {len(options)} options")
        return options[place]


class ScienceQA(MultipleChoice):
    """ScienceQA (Lu et al. 2022), test questions with a picture (SQA-I)."""

    name = "scienceqa"
    about = "school science questions with a picture"
    files = "problems.json, pid_splits.json and test/ (scienceqa.github.io)"
    groups = "subject"
    demonstration_split = "train"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        problems = self.json("problems.json")
        found = []
        for key in self.field(self.json("pid_splits.json"), split, list, "pid_splits.json"):
            where = f"problems.json problem {key}"
            entry = self.field(problems, str(key), dict, "problems.json")
            if not entry.get("image"):
                continue
            options = [str(option) for option in self.field(entry, "choices", list, where)]
            answer = self.field(entry, "answer", int, where)
            hint = entry.get("hint") or ""
            question = self.field(entry, "question", str, where)
            image = Image(path=f"{split}/{key}/{entry['image']}")
            text = f"Context: {hint}\n{question}" if hint else question
            right = self.by_place(options, answer, where)
            found.append(Example(str(key), (image,), text, (right,), tuple(options), str(entry.get("subject", ""))))
        return found


class MMBench(MultipleChoice):
    """MMBench (Liu et al. 2023), development split."""

    name = "mmbench"
    about = "abilities of many kinds; circular: right only if right in every order of the options"
    files = "one .tsv with index, question, hint, A to D, answer, category and image in base64 (MMBench_DEV_EN.tsv)"
    main = "circular"
    groups = "category"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        tables = visible(self.folder.glob("*.tsv"))
        if not tables:
            raise ValueError(f"task mmbench: {self.folder} has no .tsv. It reads {self.files}")
        if len(tables) > 1:
            raise ValueError(
                f"task mmbench: {self.folder} has several tables, {', '.join(t.name for t in tables)}: keep one"
            )
        csv.field_size_limit(sys.maxsize)
        pictures: dict[str, bytes] = {}
        found = []
        with tables[0].open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 2):
                where = f"{tables[0].name} line {number}"
                index, encoded = (self.field(row, key, str, where) for key in ("index", "image"))
                if not index.isdecimal():
                    raise ValueError(f"task mmbench: {where}: index is {index!r}, and must be a number")
                options = [row[letter] for letter in "ABCD" if row.get(letter) and row[letter] != "nan"]
                right = self.by_letter(options, self.field(row, "answer", str, where), where)
                if len(encoded) > 64:
                    try:
                        pictures[index] = base64.b64decode(encoded, validate=True)
                    except binascii.Error as error:
                        raise ValueError(f"task mmbench: {where}: image is not base64: {error}") from error
                # A short value names the row that holds the picture.
                data = pictures.get(index) or pictures.get(encoded)
                if data is None:
                    raise ValueError(f"task mmbench: {where}: image {encoded!r} is no picture and names no row above")
                question = self.field(row, "question", str, where)
                hint = row.get("hint") or ""
                text = f"{hint}\n{question}" if hint and hint != "nan" else question
                group = row.get("category") or ""
                found.append(Example(index, (Image(data=data),), text, (right,), tuple(options), group))
        return found

    def unit(self, example: Example) -> str:
        """The question, whose rows list the options in different orders."""
        return str(int(example.id) % 1_000_000)

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """`circular`: share of questions with all rows right (their indices differ by millions); `accuracy` of rows."""
        passes: dict[str, list[bool]] = defaultdict(list)
        for one in outcomes:
            passes[self.unit(one.example)].append(one.right)
        return {"circular": 100 * sum(map(all, passes.values())) / len(passes)} | super().score(outcomes)


class SEED(MultipleChoice):
    """SEED-Bench (Li et al. 2023), the questions about images."""

    name = "seed"
    about = "nine kinds of understanding of one picture"
    files = "SEED-Bench.json and SEED-Bench-image/ (huggingface.co/datasets/AILab-CVC/SEED-Bench)"
    groups = "type"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        file = "SEED-Bench.json"
        found = []
        for number, entry in enumerate(self.field(self.json(file), "questions", list, file)):
            where = f"{file} question {number}"
            if self.field(entry, "data_type", str, where) != "image":
                continue
            options = [self.field(entry, f"choice_{letter}", (str, int, float), where) for letter in "abcd"]
            texts = [str(option) for option in options]
            right = self.by_letter(texts, self.field(entry, "answer", str, where), where)
            image = Image(path=f"SEED-Bench-image/{self.field(entry, 'data_id', str, where)}")
            question, key = (
                self.field(entry, "question", str, where),
                self.field(entry, "question_id", (str, int), where),
            )
            group = str(entry.get("question_type_id", ""))
            found.append(Example(str(key), (image,), question, (right,), tuple(texts), group))
        return found


class MMMU(MultipleChoice):
    """MMMU (Yue et al. 2023), validation: up to seven pictures, named in the text. Open questions are left out."""

    name = "mmmu"
    about = "college questions, several pictures each; multiple choice only"
    files = "validation*.parquet of the subjects, in any folders (huggingface.co/datasets/MMMU/MMMU)"
    groups = "subject"
    split = "validation"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found = []
        for where, row in self.rows(split):
            if self.field(row, "question_type", str, where) != "multiple-choice":
                continue
            try:
                options = [str(option) for option in ast.literal_eval(self.field(row, "options", str, where))]
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"task mmmu: {where}: options is no list: {row['options']!r}") from error
            right = self.by_letter(options, self.field(row, "answer", str, where), where)
            text = self.field(row, "question", str, where)
            names = [int(mark) for mark in re.findall(r"<image (\d)>", "\n".join([text, *options]))]
            images = tuple(
                self.picture(row.get(f"image_{number}"), f"{where} image_{number}")
                for number in dict.fromkeys(names or [1])
            )
            key = self.field(row, "id", str, where)
            subject = re.sub(r"^(?:validation|dev|test)_|_\d+$", "", key)
            found.append(Example(key, images, text, (right,), tuple(options), subject))
        return found


class CVBench(MultipleChoice):
    """CV-Bench (Tong et al. 2024): counts, relations, depth order and distance in pictures of known geometry."""

    name = "cvbench"
    about = "2-D and 3-D vision; mean of ADE20K and COCO, and of that with Omni3D"
    files = "test*.parquet (huggingface.co/datasets/nyu-visionx/CV-Bench)"
    main = "mean"
    averaged = ""
    groups = "task"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found = []
        for where, row in self.rows(split):
            options = [str(option) for option in self.field(row, "choices", list, where)]
            right = self.by_letter(options, self.field(row, "answer", str, where), where)
            image = self.picture(row.get("image"), where)
            group = f"{self.field(row, 'task', str, where)}@{self.field(row, 'source', str, where)}"
            key, question = self.field(row, "idx", int, where), self.field(row, "question", str, where)
            found.append(Example(str(key), (image,), question, (right,), tuple(options), group))
        return found

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Accuracy in percent: `2d` (mean of its two sources), `3d`, the `mean` of both, and each kind of question."""
        scores = {}
        by_source, by_task = defaultdict(list), defaultdict(list)
        for one in outcomes:
            task, _, source = one.example.group.partition("@")
            by_source[source].append(one.right)
            by_task[task].append(one.right)
        parts = {source: 100 * sum(right) / len(right) for source, right in by_source.items()}
        flat = [value for source, value in parts.items() if source != "Omni3D"]
        means = {"2d": sum(flat) / len(flat)} if flat else {}
        means |= {"3d": parts["Omni3D"]} if "Omni3D" in parts else {}
        scores["mean"] = sum(means.values()) / len(means)
        return scores | means | {f"task/{task}": 100 * sum(right) / len(right) for task, right in by_task.items()}


class MMStar(MultipleChoice):
    """MMStar (Chen et al. 2024): questions that cannot be answered without the picture."""

    name = "mmstar"
    about = "questions that need the picture, in six categories"
    files = "mmstar.parquet (huggingface.co/datasets/Lin-Chen/MMStar); options are in the question's text"
    groups = "category"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found = []
        for where, row in self.rows("mmstar", "val"):
            text = self.field(row, "question", str, where)
            stem, options = _options_in_text(text)
            right = self.by_letter(options, self.field(row, "answer", str, where), where)
            image, key = self.picture(row.get("image"), where), self.field(row, "index", int, where)
            group = str(row.get("category", ""))
            found.append(Example(str(key), (image,), stem, (right,), tuple(options), group))
        return found

    def ask(self, example: Example) -> str:
        """The question with its options, or only the question where its options are not known."""
        if example.options == UNLISTED:
            return f"{example.question}\n{self.instruction}"
        return super().ask(example)


def _options_in_text(text: str) -> tuple[str, list[str]]:
    """The question in front of its options, and the options.

    Options stand behind `Options:` or `Choices:`, as `A: red, B: blue`, or as `(A) red` on lines of their own. Without
    such a list, as where the options are in the picture, the letters themselves are the options.
    """
    stem, *rest = re.split(r"\b(?:Options|Choices):", text, maxsplit=1)
    parts = re.split(r"(?:^|[,\n])\s*(?:\(([A-H])\)|([A-H])[:.])\s*", "".join(rest).strip())[1:]
    letters = [one or other for one, other in zip(parts[::3], parts[1::3], strict=True)]
    if len(letters) < 2 or letters != list(LETTERS[: len(letters)]):
        return text.strip(), list(UNLISTED)
    return stem.strip(), [option.strip() for option in parts[2::3]]


class AI2D(MultipleChoice):
    """AI2D (Kembhavi et al. 2016), test: questions about diagrams."""

    name = "ai2d"
    about = "questions about diagrams of school science, without those about letters drawn over labels"
    files = "questions/, images/ and ai2d_test_ids.csv (allenai.org/data/diagrams)"
    groups = ""

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        tests = {line.strip() for line in self.path(f"ai2d_{split}_ids.csv").read_text().splitlines() if line.strip()}
        found = []
        for name in sorted(tests):
            file = f"questions/{name}.png.json"
            entry = self.json(file, f"questions/{name}.json")
            image = Image(path=f"images/{self.field(entry, 'imageName', str, file)}")
            for question, asked in self.field(entry, "questions", dict, file).items():
                where = f"{file} question {question[:40]!r}"
                options = [str(option) for option in self.field(asked, "answerTexts", list, where)]
                right = self.by_place(options, self.field(asked, "correctAnswer", int, where), where)
                key = self.field(asked, "questionId", str, where)
                # Questions about letters need diagrams with letters in place of labels, which are not published.
                if not asked.get("abcLabel"):
                    found.append(Example(key, (image,), question, (right,), tuple(options)))
        return found
