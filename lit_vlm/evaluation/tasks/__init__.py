"""Benchmark tasks: how their examples are read, asked and scored."""

from lit_vlm.core.plugins import find_class
from lit_vlm.evaluation.tasks.ask import TaskSettings
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task
from lit_vlm.evaluation.tasks.captions import CocoCaptions, Flickr30k
from lit_vlm.evaluation.tasks.choice import AI2D, MMMU, SEED, CVBench, MMBench, MMStar, ScienceQA
from lit_vlm.evaluation.tasks.evaluate import Evaluated, run_task
from lit_vlm.evaluation.tasks.namings import LetterNamings
from lit_vlm.evaluation.tasks.prompts import Prompts, Shots
from lit_vlm.evaluation.tasks.records import RecordFile, Scoring
from lit_vlm.evaluation.tasks.scenes import SceneQuestions, SceneText
from lit_vlm.evaluation.tasks.text import MMLU, Perplexity
from lit_vlm.evaluation.tasks.vqa import GQA, OKVQA, ChartQA, DocVQA, TextVQA, VizWiz, VQAv2
from lit_vlm.evaluation.tasks.yes_no import MME, POPE

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        VQAv2, OKVQA, TextVQA, VizWiz, GQA, ChartQA, DocVQA, POPE, MME, ScienceQA, MMBench, SEED, MMMU, CVBench, MMStar,
        AI2D, CocoCaptions, Flickr30k, MMLU, Perplexity, SceneQuestions, SceneText, LetterNamings,
        RecordFile,
    )
}  # fmt: skip
"""The tasks of the kit by their names on the command line."""


def find_task(name: str, what: str = "--task") -> type[Task]:
    """A task by its name, or by the path of its class; `what` names the flag or key for messages.

    Raises:
        ValueError: for an unknown task, with the nearest names.
    """
    return find_class(name, Task, TASKS, what)  # type: ignore[type-abstract]


__all__ = [
    "AI2D",
    "GQA",
    "MME",
    "MMLU",
    "MMMU",
    "OKVQA",
    "POPE",
    "SEED",
    "TASKS",
    "CVBench",
    "ChartQA",
    "CocoCaptions",
    "DocVQA",
    "Evaluated",
    "Example",
    "Flickr30k",
    "LetterNamings",
    "MMBench",
    "MMStar",
    "Outcome",
    "Perplexity",
    "Prompts",
    "RecordFile",
    "SceneQuestions",
    "SceneText",
    "ScienceQA",
    "Scoring",
    "Shots",
    "Task",
    "TaskSettings",
    "TextVQA",
    "VQAv2",
    "VizWiz",
    "find_task",
    "run_task",
]
