"""From examples to prompts: demonstrations as earlier turns, as VILA and Flamingo make them."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property

from lit_vlm.data.records import Content, Image, Message, Record, Text
from lit_vlm.evaluation.metrics.choice import LETTERS
from lit_vlm.evaluation.tasks.base import Choosing, Example, Task

THINK = "Let's think step by step."
CONCLUDE = "So the answer is?"


@dataclass(frozen=True)
class Shots:
    """The demonstrations and the system text in front of a question.

    Attributes:
        shots: demonstrations with their images.
        text_shots: demonstrations without images; VILA's and Flamingo's "0-shot" has two of them.
        pool: number of examples of the training split that demonstrations are drawn from.
        seed: draws the pool, and the demonstrations of each example.
        system: system text; None takes the template's.

    Raises:
        ValueError: for a negative number of demonstrations.
    """

    shots: int = 0
    text_shots: int = 0
    pool: int = 2048
    seed: int = 42
    system: str | None = None

    @property
    def name(self) -> str:
        """Name for results: `4-shot`, or `0-shot-2-text` with demonstrations without images."""
        return f"{self.shots}-shot" + (f"-{self.text_shots}-text" if self.text_shots else "")

    def __post_init__(self) -> None:
        if self.shots < 0 or self.text_shots < 0:
            raise ValueError(
                f"demonstrations cannot be fewer than 0: {self.shots} with pictures, {self.text_shots} without"
            )


class Prompts:
    """Makes the prompts of a task.

    Args:
        task: task whose examples are asked.
        shots: demonstrations in front of a question.
        choosing: how one of several options is chosen; None leaves it to the task.

    Raises:
        ValueError: where the task has no such way of choosing or too few demonstrations, or as `Task.examples`.
    """

    def __init__(self, task: Task, shots: Shots, choosing: Choosing | None = None) -> None:
        self.task, self.shots = task, shots
        if choosing is not None and not any(example.options for example in task.examples):
            raise ValueError(f"task {task.name} has no options to choose from: leave --choose out")
        self.choosing: Choosing = choosing or task.choosing
        if self.choosing != "option" and not task.lists_options:
            raise ValueError(f"task {task.name} shows no letters in its questions: --choose option is its only way")
        self.demonstrations(task.examples[0])  # raises now if there are too few, and not at the first prompt

    @cached_property
    def _pool(self) -> dict[str, list[Example]]:
        """Demonstrations by group; all under "" where those of other groups may be shown."""
        examples = list(self.task.demonstrations)
        drawn = random.Random(self.shots.seed).sample(examples, min(self.shots.pool, len(examples)))
        pool: dict[str, list[Example]] = defaultdict(list)
        for example in drawn:
            pool[example.group if self.task.same_group else ""].append(example)
        return pool

    def demonstrations(self, example: Example) -> list[Example]:
        """The demonstrations for one example, drawn by the seed and its id: the same in every run and on every rank.

        Raises:
            ValueError: where the task has too few.
        """
        count = self.shots.shots + self.shots.text_shots
        if not count:
            return []
        group = example.group if self.task.same_group and not example.shown else ""
        pool = list(example.shown) or [other for other in self._pool.get(group, []) if other.id != example.id]
        if len(pool) < count:
            raise ValueError(
                f"task {self.task.name}: {count} demonstrations were asked for, and there are {len(pool)}"
                + (f" of group '{group}'" if group else "")
            )
        return random.Random(f"{self.shots.seed}-{example.id}").sample(pool, count)

    def record(self, example: Example, think: bool = False, thought: str | None = None) -> Record:
        """A conversation whose last message is the expected answer.

        Args:
            example: what is asked.
            think: ask for steps before the answer.
            thought: the steps that the model wrote; the prompt then asks for the answer.

        Raises:
            ValueError: as `demonstrations`.
        """
        messages = [turn for turn in example.turns if turn.role == "system"]
        if self.shots.system is not None:
            messages = [Message("system", (Text(self.shots.system),))]
        for number, shown in enumerate(self.demonstrations(example)):
            messages += self._question(shown, images=number >= self.shots.text_shots)
            messages.append(Message("assistant", (Text(self._solve(shown)),)))
        messages += self._question(example, think=think)
        if thought is not None:
            messages.append(Message("assistant", (Text(thought or THINK),)))
            messages.append(Message("user", (Text(f"{CONCLUDE}\n{self.task.instruction}".rstrip()),)))
        messages.append(Message("assistant", (Text(self._solve(example) or " "),)))
        return Record(example.id, self.task.name, tuple(messages), self._options(example))

    def _options(self, example: Example) -> tuple[str, ...]:
        if self.choosing == "generate" or not example.options:
            return ()
        return tuple(LETTERS[: len(example.options)]) if self.choosing == "letter" else example.options

    def _solve(self, example: Example) -> str:
        return example.references[0] if self.choosing == "option" else self.task.solve(example)

    def _question(self, example: Example, images: bool = True, think: bool = False) -> list[Message]:
        """The question as one message, or, of an example with turns, as these."""
        text = example.question if self.choosing == "option" else self.task.ask(example)
        if think:
            text = text.removesuffix(self.task.instruction).rstrip() + f"\n{THINK}"
        if example.turns:
            return self._turns(example, images, text.removeprefix(example.question))
        shown: tuple[Content, ...] = tuple(self._absolute(image) for image in example.images) if images else ()
        return [Message("user", (*shown, Text(f"\n{text}" if shown else text)))]

    def _turns(self, example: Example, images: bool, behind: str) -> list[Message]:
        """The turns of an example without the system's, with or without pictures, and a text behind the last."""
        messages = []
        for turn in example.turns:
            parts = [self._absolute(part) if isinstance(part, Image) else part for part in turn.content]
            kept = tuple(part for part in parts if images or isinstance(part, Text))
            if turn.role != "system":
                messages.append(Message(turn.role, kept))
        return [*messages[:-1], Message("user", (*messages[-1].content, *((Text(behind),) if behind else ())))]

    def _absolute(self, image: Image) -> Image:
        """The image under its absolute path, which may be outside of the folder: benchmarks share pictures by links."""
        if image.path is None:
            return image
        return replace(image, path=str((self.task.folder / image.path).resolve()))


def document(example: Example, task: str) -> Record:
    """The record of an example whose text itself is scored (`Task.perplexity`)."""
    return Record(example.id, task, (Message("document", (Text(example.question),)),))


def in_order(task: Task, limit: int | None, seed: int) -> list[Example]:
    """All examples, or about `limit` of them drawn by the seed, in the order of the files.

    Whole units (`Task.unit`) are drawn, so that the result may be a few examples longer.

    Raises:
        ValueError: as `Task.examples`.
    """
    examples = task.examples
    if limit is None or limit >= len(examples):
        return list(examples)
    units: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        units[task.unit(example)].append(index)
    chosen: list[int] = []
    for name in random.Random(seed).sample(list(units), len(units)):
        if len(chosen) >= limit:
            break
        chosen += units[name]
    return [examples[index] for index in sorted(chosen)]
