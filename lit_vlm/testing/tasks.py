"""Contract test of tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lit_vlm.evaluation.tasks import Outcome, Task
from lit_vlm.testing.rules import broken


def check_task(factory: Callable[[], Task], best: float | None = 100.0) -> None:
    """Check the rules of a task.

    Args:
        factory: makes a task that holds at least a few examples; it is called twice.
        best: the main score when each example is answered with its reference; None to leave that out.

    Raises:
        AssertionError: naming the rule that the task breaks.
    """
    task = factory()
    for name in ("name", "about", "files"):
        if not isinstance(getattr(task, name, None), str):
            broken(task, f"has no '{name}'", "The command line and messages call it so")
    if list(task.examples) != list(factory().examples):
        broken(task, "two alike have different examples", "A score is of the same questions every time")
    if not task.perplexity:
        _check_questions(task)
    outcomes = [Outcome(example, "" if task.perplexity else task.solve(example), 1.0, 1) for example in task.examples]
    scores = task.score(outcomes)
    if task.main not in scores:
        broken(task, f"scores are {sorted(scores)} without '{task.main}'", "`main` names one of them")
    if best is not None and abs(scores[task.main] - best) > 1e-6:
        broken(task, f"right answers have {task.main} {scores[task.main]}, not {best}", "Right answers score best")
    if task.averaged:
        # Half of them unanswered: a mean of ones alone would hide how it is made.
        mixed = [replace(one, answer="", left_out=True) if n % 2 else one for n, one in enumerate(outcomes)]
        mean, found = 100 * sum(task.score_of(one) or 0.0 for one in mixed) / len(mixed), task.score(mixed)
        if abs(found.get(task.averaged, float("nan")) - mean) > 1e-6 or task.averaged not in found:
            broken(task, f"'{task.averaged}' is {found.get(task.averaged)}, and the mean of score_of {mean}",
                   "`averaged` names the score that is 100 × the mean over questions of score_of")  # fmt: skip
    left_out = task.score([Outcome(example, "", left_out=True) for example in task.examples])
    if not task.perplexity and best is not None and left_out[task.main] >= best:
        broken(task, "what could not be asked counts as right", "No answer is never right: see Outcome.left_out")


def _check_questions(task: Task) -> None:
    for example in task.examples:
        asked = task.ask(example)
        if example.question not in asked or not asked.endswith(task.instruction):
            broken(task, f"asks {asked!r} for {example.question!r}", "The question is asked, the instruction ends it")
        if example.options and example.references[0] not in example.options:
            broken(task, f"{example.id}: {example.references[0]!r} is none of {example.options}",
                   "Of a choice the reference is one of the options, as it is listed")  # fmt: skip
