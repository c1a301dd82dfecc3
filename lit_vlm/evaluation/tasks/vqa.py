"""Questions with short answers: VQAv2, OK-VQA, TextVQA, VizWiz, GQA, ChartQA, DocVQA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lit_vlm.data.records import Image
from lit_vlm.evaluation.metrics import ANLS, Accuracy, MeanScore, RelaxedAccuracy, VQAAccuracy
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task

SHORT = "Answer the question using a single word or phrase."


class ShortAnswers(Task):
    """Short answers; the score is the mean of a metric over questions, in percent."""

    instruction = SHORT
    averaged = "accuracy"
    metric: type[MeanScore] = VQAAccuracy

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """The metric in percent, over all questions and of each group."""
        scores = {self.main: self._mean(outcomes)}
        groups = sorted({one.example.group for one in outcomes} - {""})
        return scores | {f"{self.main}/{g}": self._mean([o for o in outcomes if o.example.group == g]) for g in groups}

    def score_of(self, outcome: Outcome) -> float:
        """The metric, from 0 to 1."""
        # A question that was left out is wrong, even where the normalised reference is empty, as its answer is.
        return 0.0 if outcome.left_out else self.metric.of(outcome.answer, outcome.example.references)

    def _mean(self, outcomes: Sequence[Outcome]) -> float:
        return 100 * sum(map(self.score_of, outcomes)) / len(outcomes)


class CocoVQA(ShortAnswers):
    """Questions and annotations in VQA's form, with COCO's pictures."""

    split = "val"
    demonstration_split = "train"
    questions: ClassVar[dict[str, tuple[str, ...]]]
    annotations: ClassVar[dict[str, tuple[str, ...]]]

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        path = self.path(*self.questions[split]).name
        asked = self.field(self.json(*self.questions[split]), "questions", list, path)
        where = self.path(*self.annotations[split]).name
        answers: dict[Any, list[str]] = {}
        for number, entry in enumerate(self.field(self.json(*self.annotations[split]), "annotations", list, where)):
            place = f"{where} annotation {number}"
            listed = self.field(entry, "answers", list, place)
            answers[self.field(entry, "question_id", (int, str), place)] = [
                self.field(one, "answer", str, f"{place} answer {i}") for i, one in enumerate(listed)
            ]
        found = []
        for number, entry in enumerate(asked):
            place = f"{path} question {number}"
            key = self.field(entry, "question_id", (int, str), place)
            if key not in answers:
                raise ValueError(f"task {self.name}: {place}: question_id {key} has no answers in {where}")
            picture = self.field(entry, "image_id", int, place)
            image = Image(path=f"{split}2014/COCO_{split}2014_{picture:012}.jpg")
            found.append(Example(str(key), (image,), self.field(entry, "question", str, place), tuple(answers[key])))
        return found


class OKVQA(CocoVQA):
    """OK-VQA (Marino et al. 2019), validation."""

    name = "okvqa"
    about = "questions that need outside knowledge; VQA accuracy"
    files = (
        "OpenEnded_mscoco_{val,train}2014_questions.json, mscoco_{val,train}2014_annotations.json (okvqa.allenai.org) "
        "and COCO's val2014/ and train2014/ (cocodataset.org); train for demonstrations only"
    )
    questions: ClassVar = {split: (f"OpenEnded_mscoco_{split}2014_questions.json",) for split in ("val", "train")}
    annotations: ClassVar = {split: (f"mscoco_{split}2014_annotations.json",) for split in ("val", "train")}


class VQAv2(CocoVQA):
    """VQAv2 (Goyal et al. 2017), validation: the answers of the test splits are kept by its server."""

    name = "vqav2"
    about = "questions about COCO's pictures; VQA accuracy"
    files = (
        "v2_OpenEnded_mscoco_{val,train}2014_questions.json, v2_mscoco_{val,train}2014_annotations.json (visualqa.org) "
        "and COCO's val2014/ and train2014/ (cocodataset.org); train for demonstrations only"
    )
    questions: ClassVar = {split: (f"v2_OpenEnded_mscoco_{split}2014_questions.json",) for split in ("val", "train")}
    annotations: ClassVar = {split: (f"v2_mscoco_{split}2014_annotations.json",) for split in ("val", "train")}


class TextVQA(ShortAnswers):
    """TextVQA (Singh et al. 2019), validation, without OCR tokens in the question."""

    name = "textvqa"
    about = "questions about text in pictures; VQA accuracy"
    files = "TextVQA_0.5.1_{val,train}.json and train_images/ (textvqa.org); train for demonstrations only"
    split = "val"
    demonstration_split = "train"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        file = f"TextVQA_0.5.1_{split}.json"
        found = []
        for number, entry in enumerate(self.field(self.json(file), "data", list, file)):
            where = f"{file} entry {number}"
            answers = self.field(entry, "answers", list, where)
            image = Image(path=f"train_images/{self.field(entry, 'image_id', str, where)}.jpg")
            key = self.field(entry, "question_id", (int, str), where)
            question = self.field(entry, "question", str, where)
            found.append(Example(str(key), (image,), question, tuple(map(str, answers))))
        return found


class VizWiz(ShortAnswers):
    """VizWiz-VQA (Gurari et al. 2018), validation."""

    name = "vizwiz"
    about = "questions of blind people about their pictures, some unanswerable; VQA accuracy"
    files = "val.json, train.json and the folders val/ and train/ (vizwiz.org); train for demonstrations only"
    split = "val"
    demonstration_split = "train"
    instruction = (
        "When the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found = []
        for number, entry in enumerate(self.listed(f"{split}.json")):
            where = f"{split}.json entry {number}"
            answers = [
                self.field(one, "answer", str, f"{where} answer {i}")
                for i, one in enumerate(self.field(entry, "answers", list, where))
            ]
            image = self.field(entry, "image", str, where)
            question = self.field(entry, "question", str, where)
            found.append(Example(image, (Image(path=f"{split}/{image}"),), question, tuple(answers)))
        return found


class GQA(ShortAnswers):
    """GQA (Hudson and Manning 2019), balanced test-dev."""

    name = "gqa"
    about = "questions of several steps about scene graphs; exact match"
    files = "testdev_balanced_questions.json and images/ (cs.stanford.edu/people/dorarad/gqa)"
    metric = Accuracy
    split = "testdev"

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        file = f"{split}_balanced_questions.json"
        found = []
        asked = self.json(file)
        if not isinstance(asked, dict):
            raise ValueError(f"task gqa: {file} must be an object from question ids to questions")
        for key, entry in asked.items():
            where = f"{file} question {key}"
            image = Image(path=f"images/{self.field(entry, 'imageId', str, where)}.jpg")
            answer = self.field(entry, "answer", str, where)
            found.append(Example(str(key), (image,), self.field(entry, "question", str, where), (answer,)))
        return found


class ChartQA(ShortAnswers):
    """ChartQA (Masry et al. 2022), test: human and augmented questions."""

    name = "chartqa"
    about = "questions about charts; relaxed accuracy"
    files = "test/test_human.json, test/test_augmented.json and test/png/ (github.com/vis-nlp/ChartQA)"
    metric = RelaxedAccuracy

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        found = []
        for group in ("human", "augmented"):
            file = f"{split}/{split}_{group}.json"
            for number, entry in enumerate(self.listed(file)):
                where = f"{file} entry {number}"
                image = Image(path=f"{split}/png/{self.field(entry, 'imgname', str, where)}")
                question, label = (self.field(entry, key, str, where) for key in ("query", "label"))
                found.append(Example(f"{group}-{number}", (image,), question, (label,), group=group))
        return found


class DocVQA(ShortAnswers):
    """DocVQA (Mathew et al. 2021), validation: the answers of the test split are kept by its server."""

    name = "docvqa"
    about = "questions about scanned documents; ANLS"
    files = "val_v1.0_withQT.json (or val_v1.0.json) and documents/ (docvqa.org)"
    metric = ANLS
    split = "val"
    main = averaged = "anls"
    max_new_tokens = 32

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
        file = self.path(*names).name
        found = []
        for number, entry in enumerate(self.field(self.json(*names), "data", list, file)):
            where = f"{file} entry {number}"
            image = Image(path=self.field(entry, "image", str, where))
            answers = tuple(map(str, self.field(entry, "answers", list, where)))
            key = self.field(entry, "questionId", (int, str), where)
            found.append(Example(str(key), (image,), self.field(entry, "question", str, where), answers))
        return found
