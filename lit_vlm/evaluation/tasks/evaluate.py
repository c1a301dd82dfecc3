"""Running a task: prompts, batched answers, scores, and files with answers, scores and settings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_vlm import __version__
from lit_vlm.core.written import write_whole
from lit_vlm.data.records import Message, Text
from lit_vlm.data.sources.base import describe
from lit_vlm.evaluation.asker import Asker
from lit_vlm.evaluation.tasks.ask import TaskSettings, ask
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task
from lit_vlm.evaluation.tasks.prompts import Prompts, in_order

log = logging.getLogger(__name__)

ANSWERS, SCORES = "answers.jsonl", "scores.json"


@dataclass(frozen=True)
class Evaluated:
    """A task's result.

    Attributes:
        scores: by name, in the unit that papers print.
        main: name of the score that stands for the task.
        count: number of examples.
        left_out: examples that could not be asked, by reason; they count as wrong.
        unwritten: why answers and scores could not be written; None if they were, or were not to be.
    """

    scores: dict[str, float]
    main: str
    count: int
    left_out: dict[str, int]
    unwritten: str | None = None


def run_task(
    asker: Asker,
    task: Task,
    settings: TaskSettings,
    out: Path | None = None,
    checkpoint: str = "",
    resume: bool = True,
    on_answer: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluated:
    """Ask every example of a task, score the answers, and write both.

    With `out`, a run that was cut off goes on: answers that are there are not asked for again. All processes of a
    distributed run must call this together; they share the examples.

    Args:
        asker: the model and how its prompts are written.
        task: what is asked.
        settings: how it is asked.
        out: folder for answers.jsonl and scores.json.
        checkpoint: path of the checkpoint, for the files. Answers of another path or time of writing are refused.
        resume: take answers that `out` holds; otherwise they are removed.
        on_answer: called at the start and after each answer with the number of answers of this process so far and in
            the end.

    Raises:
        ValueError: where `out` holds answers of another checkpoint, task or setting, no example could be asked, or as
            `Task.examples` and `Prompts`.
    """
    examples = in_order(task, settings.limit, settings.prompt.seed)
    prompts = Prompts(task, settings.prompt, settings.choosing)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    how = _how(asker, task, settings, checkpoint)
    done = _read_answers(out, how) if out is not None and resume else {}
    if out is not None and not resume and rank == 0:
        for old in (*out.glob("answers*.jsonl"), *out.glob(SCORES)):
            old.unlink()
    if dist.is_initialized():
        dist.barrier()  # no rank writes before all have read
    left = [example for example in examples if example.id not in done]
    mine = left[rank::world]
    found: list[dict[str, Any]] = []
    keep = _partial(out, rank, how)
    on_answer(0, len(mine))
    with asker.evaluating():
        for line in ask(asker, prompts, mine, settings, -(-len(left) // world), out is not None):
            found.append(line)
            keep(line)
            on_answer(len(found), len(mine))
    lines = done | {line["id"]: line for of_rank in _gathered(found) for line in of_rank}
    outcomes = [_outcome(example, lines[example.id]) for example in examples]
    try:
        result = _result(task, outcomes, lines)
    except ValueError:
        _clear(out if rank == 0 else None)
        raise
    if out is not None and rank == 0:
        asked = {example.id for example in examples}
        others = [line for key, line in done.items() if key not in asked]  # of a run with a larger limit, or none
        lines_in_order = [*(lines[one.example.id] | _score_of(task, one) for one in outcomes), *others]
        try:
            _write(out, _saved(result, task, settings, checkpoint, outcomes), how, lines_in_order)
        except OSError as error:  # the others wait, and a training run goes on
            result = replace(result, unwritten=str(error))
            log.warning("answers and scores could not be written: %s", error)
    if dist.is_initialized():
        dist.barrier()
    return result


def _partial(out: Path | None, rank: int, how: str) -> Callable[[dict[str, Any]], None]:
    """A function that writes a line at once, so that an interrupted run loses none; without `out` it does nothing."""
    if out is None:
        return lambda line: None
    path, failed = out / f"answers.{rank}.partial.jsonl", False

    def keep(line: dict[str, Any]) -> None:
        nonlocal failed
        try:
            out.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"how": how} | line, ensure_ascii=False) + "\n")
        except OSError as error:  # all are written again at the end
            if not failed:
                log.warning("%s cannot be written: %s", path, error)
            failed = True

    return keep


def _result(task: Task, outcomes: Sequence[Outcome], lines: Mapping[str, dict[str, Any]]) -> Evaluated:
    asked = [lines[one.example.id] for one in outcomes]
    left_out = dict(sorted(Counter(line["left_out"] for line in asked if line["left_out"]).items()))
    if sum(left_out.values()) == len(asked):
        raise ValueError(
            f"task {task.name}: none of {len(asked)} examples could be asked: {left_out}, first: "
            f"{asked[0].get('detail', '')}"
        )
    return Evaluated(task.score(outcomes), task.main, len(outcomes), left_out)


def _clear(out: Path | None) -> None:
    """Remove what an attempt without any answer left in the folder."""
    if out is None:
        return
    for partial in out.glob("answers.*.partial.jsonl"):
        partial.unlink()
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _score_of(task: Task, outcome: Outcome) -> dict[str, Any]:
    """The score of one question and its group, as fields of its line."""
    return {"score": task.score_of(outcome), "group": outcome.example.group}


def _how(asker: Asker, task: Task, settings: TaskSettings, checkpoint: str) -> str:
    written, prompt = asker.format, settings.prompt
    own = [shown for example in task.examples for shown in example.shown]
    shown = [_hashed(own or task.demonstrations)] if prompt.shots + prompt.text_shots else []
    text = json.dumps(
        [
            checkpoint, _written(checkpoint), task.name, str(task.folder.resolve()), _hashed(task.examples), *shown,
            settings.decisive(), describe(written.template), describe(written.transform), written.max_length,
            written.fast_jpeg,
        ]
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hashed(examples: Sequence[Example]) -> str:
    """A hash of all that stands in examples, pictures by their paths."""
    found = hashlib.sha256()
    for one in examples:
        paths = [image.path for image in one.images]
        turns = [_described(turn) for turn in one.turns]
        what = [one.id, one.question, one.options, one.references, paths, *([turns] if turns else [])]
        found.update(json.dumps(what).encode())
    return found.hexdigest()


def _described(turn: Message) -> list[Any]:
    """A turn as plain values, pictures by their paths (frames with their moments) or the hashes of their bytes."""
    content: list[Any] = [turn.role]
    for part in turn.content:
        if isinstance(part, Text):
            content.append(part.text)
        else:
            shown = hashlib.sha256(part.data).hexdigest() if part.data is not None else part.path
            content.append([shown] if part.moment is None else [shown, part.moment])
    return content


def _written(checkpoint: str) -> int:
    """Time at which a checkpoint was written, as a run that goes on may replace it; 0 without a file."""
    path = Path(checkpoint)
    file = path / ".metadata" if path.is_dir() else path
    return file.stat().st_mtime_ns if checkpoint and file.exists() else 0


def _outcome(example: Example, line: dict[str, Any]) -> Outcome:
    return Outcome(example, line["answer"], line["nll"], line["tokens"], bool(line["left_out"]))


def _gathered(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The lines of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [found]
    parts: list[list[dict[str, Any]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    return parts


def _read_answers(out: Path, how: str) -> dict[str, dict[str, Any]]:
    """Answers of an earlier run into the same folder, by example; an incomplete last line is left out."""
    done: dict[str, dict[str, Any]] = {}
    for file in sorted(out.glob("answers*.jsonl")):
        # A cut line may end inside a letter; answers may hold other line breaks.
        for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["left_out"]:  # it can be asked by now, its picture may exist; in any case it is no answer
                continue
            if line.pop("how", None) != how:
                raise ValueError(
                    f"{file} holds answers of another checkpoint, of other questions or settings: --overwrite asks "
                    "anew and replaces them, another --out keeps them"
                )
            done[line["id"]] = line
    return done


def _saved(
    result: Evaluated, task: Task, settings: TaskSettings, checkpoint: str, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The content of scores.json."""
    options = [len(one.example.options) for one in outcomes]
    return {
        "task": task.name,
        "scores": result.scores,
        "main": result.main,
        "averaged": task.averaged or None,
        "lower": list(task.lower),
        "chance": 100 * sum(1 / count for count in options) / len(options) if all(options) else None,
        "count": result.count,
        "left_out": result.left_out,
        "checkpoint": checkpoint,
        "folder": str(task.folder),
        "settings": settings.plain(),
        "lit_vlm": __version__,
        "torch": torch.__version__,
    }


def _write(out: Path, saved: Mapping[str, Any], how: str, lines: Sequence[dict[str, Any]]) -> None:
    """Write all answers in the order of the task, and the scores; remove partial files."""
    out.mkdir(parents=True, exist_ok=True)
    scratch = out / f"{ANSWERS}.{os.getpid()}"
    with scratch.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"how": how} | line, ensure_ascii=False) + "\n" for line in lines)
    scratch.replace(out / ANSWERS)
    for partial in out.glob("answers.*.partial.jsonl"):
        partial.unlink()
    write_whole(out / SCORES, json.dumps(saved, indent=2) + "\n")
