"""Generated scenes: questions and demonstrations that need no file."""

from __future__ import annotations

from itertools import islice
from typing import ClassVar, Literal

from lit_vlm.data.records import Record
from lit_vlm.evaluation.tasks.base import Example
from lit_vlm.evaluation.tasks.choice import MultipleChoice
from lit_vlm.worlds.scenes import Scenes
from lit_vlm.worlds.scenes.questions import QUESTION_KINDS


class SceneQuestions(MultipleChoice):
    """Multiple choice about scenes, options compared by likelihood; demonstrations are of the same kind.

    Args:
        folder: not used: scenes are drawn.
        count: questions of each kind.
    """

    name = "scenes"
    about = "generated scenes, five kinds of questions; needs no files"
    files = "nothing: scenes are drawn"
    instruction = ""
    groups = "kind"
    choosing = "option"
    same_group = True
    lists_options = False  # options are in the question's words, or are numbers, colours or shapes
    needs_files = False
    source: ClassVar[Literal["questions", "text"]] = "questions"
    split = "held_out"
    demonstration_split = "train"

    def __init__(self, folder: str = ".", count: int = 160) -> None:
        super().__init__(folder)
        self.count = count

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        held_out = split == self.split
        count = self.count if held_out else 64
        found = []
        for kind in QUESTION_KINDS:
            # Seed 1000: no recipe trains on it. 4 × count: half of the texts are documents without a question.
            source = Scenes(
                self.source,
                4 * count,
                1000,
                split="held_out" if held_out else "train",
                question_kinds=[kind],
                max_things=3,
                wording="plain",
            )
            asked = (_example(source.record(index), kind, split) for index in range(len(source)))
            found += list(islice((example for example in asked if example is not None), count))
        return found

    def solve(self, example: Example) -> str:
        """The right option, as the answer that a demonstration gives."""
        return example.references[0]


class SceneText(SceneQuestions):
    """The questions of `SceneQuestions` about descriptions: what a decoder can do without pictures."""

    name = "scenes_text"
    about = "the same questions about descriptions in words, without pictures; needs no files"
    source = "text"


def _example(record: Record, kind: str, split: str) -> Example | None:
    """A question with its options; None for a record without."""
    if not record.options:
        return None
    question, answer = record.messages[0].text.strip(), record.messages[-1].text
    return Example(f"{split}-{record.id}", tuple(record.images), question, (answer,), record.options, kind)
