"""What the last stage of each run of an ablation is asked: tasks, files of questions, probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A part of a file of settings: no other keys than these, and fixed once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Evaluation(Strict):
    """Questions that the last stage of each run is asked: arguments of `lit-vlm evaluate`.

    Attributes:
        task: name or class path of a task.
        file: records of the user's own, in place of a task.
        score: how answers to the user's own are scored.
        shots: numbers of demonstrations.
        data: folder of the tasks' files.
        limit: so many examples.
        flags: further flags of `lit-vlm evaluate`, name → value.
    """

    task: str | None = None
    file: Path | None = None
    score: str | None = None
    shots: tuple[int, ...] = (0,)
    data: Path | None = None
    limit: int | None = None
    flags: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> Evaluation:
        if (self.task is None) == (self.file is None):
            raise ValueError("name either a task or a file of your own questions")
        if self.score is not None and self.file is None:
            raise ValueError("score is for a file of your own questions; a task has its own")
        return self

    @property
    def name(self) -> str:
        """A name for tables."""
        return self.task or (self.file.stem if self.file is not None else "")

    def words(self) -> list[str]:
        """Arguments of `lit-vlm evaluate`, but for the checkpoint."""
        named = {"task": self.task, "file": self.file, "score": self.score, "data": self.data, "limit": self.limit}
        words = [word for key, value in named.items() if value is not None for word in (f"--{key}", str(value))]
        return [*words, "--shots", ",".join(map(str, self.shots)), *_option_words(self.flags)]


class Probing(Strict):
    """Probes of the layers of the last stage of each run: arguments of `lit-vlm probe`.

    Attributes:
        target: `depth`, `seg`, `gen`, or another head of the recipe.
        flags: further flags of `lit-vlm probe`, name → value.
    """

    target: str
    flags: dict[str, Any] = Field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder of its results, in that of the stage."""
        return f"probe-{self.target}"

    def words(self, stage: Path) -> list[str]:
        """Arguments of `lit-vlm probe`.

        Args:
            stage: folder of the stage.
        """
        return [str(stage), "--target", self.target, "--out", str(stage / self.folder), *_option_words(self.flags)]


def refuse_doubles(evaluations: Sequence[Evaluation], probes: Sequence[Probing]) -> None:
    """Refuse two evaluations or probes whose results would have the same name.

    Raises:
        ValueError: naming it.
    """
    asked: set[tuple[str, int]] = set()
    for one in evaluations:
        for shots in one.shots:
            if (one.name, shots) in asked:
                raise ValueError(f"evaluate: {one.name} with {shots} shots is there twice; results are kept by name")
            asked.add((one.name, shots))
    targets = [one.target for one in probes]
    if double := [target for target in targets if targets.count(target) > 1]:
        raise ValueError(f"probe: {double[0]} is there twice; results are kept by target")
    if given := [key for one in probes for key in ("out", "target") if key in one.flags]:
        raise ValueError(f"probe: {given[0]} is no flag here: the ablation sets it")


def _option_words(flags: Mapping[str, Any]) -> list[str]:
    """Options as words of a command; those that take no value stand for true."""
    words: list[str] = []
    for key, value in flags.items():
        if value is not False and value is not None:
            words += [f"--{key}", *([] if value is True else [str(value)])]
    return words
