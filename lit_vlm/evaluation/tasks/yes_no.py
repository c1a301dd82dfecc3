"""Yes or no: POPE and MME."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lit_vlm.data.records import Image
from lit_vlm.data.records.files import visible
from lit_vlm.data.records.media import IMAGE_SUFFIXES
from lit_vlm.evaluation.metrics import YesNoF1, first_word_yes_or_no, yes_or_no
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task
from lit_vlm.evaluation.tasks.vqa import SHORT


class POPE(Task):
    """POPE (Li et al. 2023): is this object in the picture; random, popular and adversarial objects."""

    name = "pope"
    about = "objects that are there or not; mean F1 of the three splits"
    files = "coco_pope_{random,popular,adversarial}.json (github.com/AoiDragon/POPE) and COCO's val2014/"
    instruction = SHORT
    main = "f1"
    splits = ("random", "popular", "adversarial")

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found = []
        for name in self.splits:
            file = self.path(f"coco_pope_{name}.json", f"coco/coco_pope_{name}.json")
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if not line.strip():
                    continue
                where = f"{file.name} line {number}"
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"task pope: {where} is not JSON: {error}") from error
                label = self.field(entry, "label", str, where)
                if label not in ("yes", "no"):
                    raise ValueError(f"task pope: {where}: label is {label!r}, and must be yes or no")
                image = Image(path=f"val2014/{self.field(entry, 'image', str, where)}")
                question = self.field(entry, "text", str, where)
                found.append(Example(f"{name}-{number}", (image,), question, (label,), group=name))
        return found

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Scores of `YesNoF1` in percent: their means over the splits, and those of each split."""
        scores: dict[str, float] = {}
        means: dict[str, list[float]] = defaultdict(list)
        for split in sorted({one.example.group for one in outcomes}):
            metric = YesNoF1()
            for one in outcomes:
                if one.example.group == split:
                    label = one.example.references[0]
                    opposite = "no" if label == "yes" else "yes"
                    metric.update(opposite if one.left_out else one.answer, label)
            for key, value in metric.compute().items():
                scores[f"{key}/{split}"] = 100 * float(value)
                means[key].append(100 * float(value))
        return {key: sum(values) / len(values) for key, values in means.items()} | scores

    def score_of(self, outcome: Outcome) -> float:
        """1 for a right answer, else 0."""
        return float(not outcome.left_out and yes_or_no(outcome.answer) == outcome.example.references[0])


class MME(Task):
    """MME (Fu et al. 2023): two questions about each picture, one to be answered by yes, one by no."""

    name = "mme"
    about = "perception and cognition in 14 categories; the sum over categories of accuracy and of pairs both right"
    files = (
        "one folder per category (existence/, count/, ...) with pictures and a .txt of the same name beside each, or "
        "in images/ and questions_answers_YN/; each line a question, a tab, Yes or No (MME_Benchmark_release_version)"
    )
    instruction = SHORT
    main = "perception"
    perception = (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    )  # fmt: skip
    cognition = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found: list[Example] = []
        for category in (*self.perception, *self.cognition):
            folder = self.path(category)
            texts = visible(folder.glob("questions_answers_YN/*.txt")) or visible(folder.glob("*.txt"))
            if not texts:
                raise ValueError(f"task mme: {folder} holds no .txt. It reads {self.files}")
            for text in texts:
                found += self._pair(category, text)
        return found

    def _pair(self, category: str, text: Path) -> list[Example]:
        folder = text.parent.parent / "images" if text.parent.name == "questions_answers_YN" else text.parent
        images = [folder / f"{text.stem}{suffix}" for suffix in IMAGE_SUFFIXES]
        image = next((path for path in images if path.exists()), None)
        if image is None:
            raise ValueError(f"task mme: there is no picture {folder / text.stem} of {text}")
        found = []
        for number, line in enumerate(text.read_text(encoding="utf-8").splitlines(), 1):
            question, tab, answer = line.strip().rpartition("\t")
            if not line.strip():
                continue
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise ValueError(f"task mme: {text} line {number} is not a question, a tab, and Yes or No")
            # The official questions end with "Please answer yes or no."; `ask` adds the instruction of this task.
            question = question.replace(" Please answer yes or no.", "")
            path = Image(path=str(image.relative_to(self.folder)))
            name = f"{category}/{text.stem}/{number}"
            found.append(Example(name, (path,), question, (answer.strip().lower(),), group=category))
        return found

    def unit(self, example: Example) -> str:
        """The picture with its two questions."""
        return example.id.rsplit("/", 1)[0]

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Accuracy plus accuracy of pairs of each category, in percent, and their sums over categories."""
        scores: dict[str, float] = {}
        for category in sorted({one.example.group for one in outcomes}):
            pairs: dict[str, list[bool]] = defaultdict(list)
            for one in outcomes:
                if one.example.group == category:
                    pairs[self.unit(one.example)].append(self.score_of(one) == 1)
            every = [right for pair in pairs.values() for right in pair]
            both = [all(pair) for pair in pairs.values()]
            scores[category] = 100 * sum(every) / len(every) + 100 * sum(both) / len(both)
        sums = {
            "perception": sum(scores.get(category, 0.0) for category in self.perception),
            "cognition": sum(scores.get(category, 0.0) for category in self.cognition),
        }
        return sums | scores

    def score_of(self, outcome: Outcome) -> float:
        """1 for a right answer, else 0."""
        return float(not outcome.left_out and first_word_yes_or_no(outcome.answer) == outcome.example.references[0])
