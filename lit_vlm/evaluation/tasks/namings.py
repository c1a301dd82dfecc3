"""Letters for what pictures show: what a model learns from demonstrations alone."""

from __future__ import annotations

from lit_vlm.data.records import Image, Message, Record
from lit_vlm.evaluation.tasks.base import Example
from lit_vlm.evaluation.tasks.choice import MultipleChoice
from lit_vlm.worlds.namings import QUESTION, Namings


class LetterNamings(MultipleChoice):
    """Letters for colours or shapes of single things, bound anew for each question; each is demonstrated once.

    Without demonstrations there is nothing to know, so 0 shots are right by chance, 25 %.

    Args:
        folder: not used: pictures are drawn.
        count: number of questions.
    """

    name = "namings"
    about = "letters for colours and shapes, which four demonstrations tell; needs no files"
    files = "nothing: pictures are drawn"
    instruction = ""
    groups = "attribute"
    choosing = "option"
    lists_options = False
    needs_files = False
    split = "held_out"

    def __init__(self, folder: str = ".", count: int = 320) -> None:
        super().__init__(folder)
        self.count = count

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        source = Namings("questions", self.count, 1000, split="held_out")  # no recipe trains on seed 1000
        return [_example(source.record(index)) for index in range(len(source))]

    def solve(self, example: Example) -> str:
        """The right letter, as the answer that a demonstration gives."""
        return example.references[0]


def _example(record: Record) -> Example:
    """The last question of a conversation, with the turns before it as its demonstrations."""
    attribute = record.id.partition("-")[0]
    pairs = list(zip(record.messages[::2], record.messages[1::2], strict=True))
    asked = [_asked(f"{record.id}-{place}", *pair, record.options, attribute) for place, pair in enumerate(pairs)]
    last = asked[-1]
    return Example(
        record.id, last.images, last.question, last.references, last.options, attribute, shown=tuple(asked[:-1])
    )


def _asked(name: str, user: Message, answer: Message, options: tuple[str, ...], attribute: str) -> Example:
    images = tuple(part for part in user.content if isinstance(part, Image))
    return Example(name, images, QUESTION, (answer.text,), options, attribute)
