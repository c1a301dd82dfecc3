"""What is evaluated: questions in, scores out."""

from lit_vlm.tasks.ask import Reader, Settings
from lit_vlm.tasks.base import Example, Outcome, Task
from lit_vlm.tasks.captions import CocoCaptions, Flickr30k
from lit_vlm.tasks.choice import AI2D, MMMU, SEED, CVBench, MMBench, MMStar, ScienceQA
from lit_vlm.tasks.evaluate import Evaluated, run_task
from lit_vlm.tasks.held_out import Answer, HeldOutScores, answer_records, evaluate_held_out
from lit_vlm.tasks.prompts import Prompts, Shots
from lit_vlm.tasks.scenes import SceneQuestions, SceneText
from lit_vlm.tasks.text import MMLU, Perplexity
from lit_vlm.tasks.vqa import GQA, OKVQA, ChartQA, DocVQA, TextVQA, VizWiz, VQAv2
from lit_vlm.tasks.yes_no import MME, POPE

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        VQAv2, OKVQA, TextVQA, VizWiz, GQA, ChartQA, DocVQA, POPE, MME, ScienceQA, MMBench, SEED, MMMU, CVBench, MMStar,
        AI2D, CocoCaptions, Flickr30k, MMLU, Perplexity, SceneQuestions, SceneText,
    )
}  # fmt: skip
"""By the name on the command line."""

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
    "Answer",
    "CVBench",
    "ChartQA",
    "CocoCaptions",
    "DocVQA",
    "Evaluated",
    "Example",
    "Flickr30k",
    "HeldOutScores",
    "MMBench",
    "MMStar",
    "Outcome",
    "Perplexity",
    "Prompts",
    "Reader",
    "SceneQuestions",
    "SceneText",
    "ScienceQA",
    "Settings",
    "Shots",
    "Task",
    "TextVQA",
    "VQAv2",
    "VizWiz",
    "answer_records",
    "evaluate_held_out",
    "run_task",
]
