"""Scores in the folder of a stage: held-out records, tasks, probes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_vlm.checkpoints.folder import DONE_FILE, is_done, step_of
from lit_vlm.experiments.results import Score

HELD_OUT, HELD_OUT_ANSWERS = "held_out.json", "held_out.jsonl"
LOWER = ("loss", "perplexity")
"""Scores of which a lower value is the better one."""

HARMLESS = ("batch_size", "workers", "dtype", "limit")
"""Settings of an evaluation on which answers depend by rounding at most, and the limit, as questions are paired."""

log = logging.getLogger(__name__)


def stage_scores(stage: Path) -> dict[str, Score]:
    """All scores in the folder of a stage.

    Args:
        stage: its folder.

    Returns:
        name → score: `held_out/accuracy`, `held_out/loss`, `held_out/SOURCE/accuracy`, `held_out/shuffled/accuracy`
        (with pictures of other questions), `TASK/PROMPT/SCORE` such as `scenes/4-shot/accuracy`, `probe/TARGET/cosine`.

    Raises:
        ValueError: for a file of scores that cannot be read.
    """
    return probe_scores(stage) | task_scores(stage) | held_out_scores(stage)


# ---------------------------------------------------------------------- held-out records


def held_out_scores(stage: Path) -> dict[str, Score]:
    """What `callbacks.HeldOut` found at the end of a stage; nothing where it did not run."""
    file = stage / HELD_OUT
    found = _json(file) if file.is_file() else {}
    if "after" not in found:
        return {}
    lines = _lines(stage / HELD_OUT_ANSWERS)
    answers = [line for line in lines if line["when"] == "after"]
    after, shuffled = found["after"], found.get("shuffled") or {}
    by_source = after.get("by_source") or {}
    scores = _of_records("held_out", after, shuffled, by_source, answers, main=True)
    for source, own in by_source.items():
        mixed = (shuffled.get("by_source") or {}).get(source) or {}
        mine = [line for line in answers if line["source"] == source]
        scores |= _of_records(f"held_out/{source}", own, mixed, {}, mine, main=False)
    without = [line for line in lines if line["when"] == "shuffled"]
    control = _of_records("held_out/shuffled", shuffled, {}, shuffled.get("by_source") or {}, without, main=False)
    return control | scores


def _of_records(
    prefix: str,
    own: Mapping[str, Any],
    shuffled: Mapping[str, Any],
    by_source: Mapping[str, Mapping[str, Any]],
    answers: list[dict[str, Any]],
    main: bool,
) -> dict[str, Score]:
    """Scores of records: accuracy is that of choices where there are options to choose from, else exact match."""
    accuracy = _accuracy(own)
    chance = own.get("choice_chance") if own.get("num_choices") else None
    shown = {"loss": "loss", "accuracy": accuracy, "exact_match": "exact_match", "token_f1": "token_f1"}
    scores = {}
    for name, key in shown.items():
        if own.get(key) is None:
            continue
        value = float(own[key])
        # The loss is a mean over tokens, which questions have more or fewer of.
        asked = [line for line in answers if line.get(key) is not None and name != "loss"]
        scores[f"{prefix}/{name}"] = Score(
            value=value,
            better="lower" if name in LOWER else "higher",
            answers={name: float(line[key]) for name, line in zip(_questions(asked), asked, strict=True)},
            kinds={name: line["source"] for name, line in zip(_questions(asked), asked, strict=True)},
            chance=chance if name == "accuracy" else None,
            shuffled=shuffled.get(key),
            share=name != "loss",
            main=main and name in ("loss", "accuracy"),
            by_kind={
                source: float(its[kind])
                for source, its in (by_source.items() if len(by_source) > 1 else ())
                if its.get(kind := _accuracy(its) if name == "accuracy" else key) is not None
            },
        )
    return scores


def _questions(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of records among those of all sources; a name that comes again, in the order of the file, gets a number."""
    seen: Counter[str] = Counter()
    names = []
    for line in lines:
        name = f"{line['source']}/{line['id']}"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def _accuracy(scores: Mapping[str, Any]) -> str:
    return "choice_accuracy" if scores.get("num_choices") else "exact_match"


# ---------------------------------------------------------------------- tasks


def task_scores(stage: Path) -> dict[str, Score]:
    """What `lit-vlm evaluate` left beside a stage, and what `callbacks.Evaluate` found at its end."""
    while_training: dict[Path, Path] = {}
    for file in (stage / "tasks").glob("*/*/*/scores.json"):  # tasks/TASK/PROMPT/STEP
        last = while_training.get(file.parents[1])
        if last is None or int(last.parent.name) < int(file.parent.name):
            while_training[file.parents[1]] = file
    scores: dict[str, Score] = {}
    for prompt, file in sorted(while_training.items()):
        scores |= scores_of_task(file, prompt.name)
    # Those asked for afterwards have the last word; those of other checkpoints than the last are a folder deeper.
    for file in sorted((stage / "evaluation").glob("*/*/scores.json")):
        if _is_of_end(file, stage):
            scores |= scores_of_task(file, file.parent.name)
        else:
            log.warning("%s is of an earlier checkpoint than the last one, and is left out: evaluate anew", file)
    return scores


def _is_of_end(file: Path, stage: Path) -> bool:
    """Whether scores are those of the checkpoint with which training ended, as far as both are known."""
    return _may_be_end(step_of(Path(str(_json(file).get("checkpoint", "")))), stage)


def _may_be_end(step: int, stage: Path) -> bool:
    """Whether a step is the last one of a stage, as far as both are known; −1 is a step that is not."""
    end = read_object(stage / DONE_FILE, "its stage has to be trained anew")["step"] if is_done(stage) else -1
    return -1 in (step, end) or step == end


def scores_of_task(file: Path, prompt: str) -> dict[str, Score]:
    """The scores of one task and prompt; those of tasks that average over questions become shares.

    Those of a model in fewer bits stand for nothing but themselves, so none of them is the main one.

    Args:
        file: scores.json, beside answers.jsonl.
        prompt: name of the prompt, for the names of the scores, `TASK/PROMPT/SCORE`.

    Raises:
        ValueError: for a file that cannot be read, or of something else.
    """
    found = _json(file)
    if lacking := [key for key in ("task", "scores", "main", "count") if key not in found]:
        raise ValueError(f"{file} has no {lacking[0]!r}, so it is not of lit-vlm evaluate: move it away")
    # Files of earlier versions do not tell which score is a mean over questions.
    averaged = found.get("averaged", "accuracy" if found["main"] == "accuracy" else None)
    # Answers of an earlier run with a larger limit stand behind the ones that count.
    lines = _lines(file.with_name("answers.jsonl"))[: found["count"]]
    own = {line["id"]: float(line["score"]) for line in lines if line.get("score") is not None}
    groups = {line["id"]: line["group"] for line in lines if line.get("group") and line["id"] in own}
    scores = {}
    for name, value in found["scores"].items():
        lower, main = name in found.get("lower", LOWER), name == found["main"]
        scale = 100 if averaged and not lower else 1
        each = own if name == averaged and len(own) == found["count"] else {}
        kinds = groups if each else {}
        by_name = _by_name(found["scores"], name) if main else {}
        scores[f"{found['task']}/{prompt}/{name}"] = Score(
            value=value / scale,
            better="lower" if lower else "higher",
            answers=each,
            kinds=kinds,
            chance=found["chance"] / scale if each and found.get("chance") is not None else None,
            share=scale == 100,
            main=main and not (found.get("settings") or {}).get("quantise"),
            by_kind=_by_group(each, kinds) or {kind: its / scale for kind, its in by_name.items()},
            asked=_decisive(found, paired=bool(each)),
        )
    return scores


def _decisive(found: Mapping[str, Any], paired: bool) -> dict[str, Any]:
    """Settings of an evaluation on which answers depend; and how many there are, where they are not paired."""
    settings = dict(found.get("settings") or {})
    prompt = settings.pop("prompt", None) or {}
    limit = {} if paired else {"questions": found["count"]}
    return {**prompt, **{name: value for name, value in settings.items() if name not in HARMLESS}, **limit}


def _by_group(each: Mapping[str, float], groups: Mapping[str, str]) -> dict[str, float]:
    """Mean of each group of questions."""
    members: dict[str, list[float]] = {}
    for question, group in sorted(groups.items(), key=lambda item: item[1]):
        members.setdefault(group, []).append(each[question])
    return {group: fmean(values) for group, values in members.items()}


def _by_name(scores: Mapping[str, float], main: str) -> dict[str, float]:
    """The scores of kinds of question, by the names that tasks give them: `MAIN/KIND`, or `WORD/KIND`."""
    words = {name.partition("/")[0] for name in scores if "/" in name}
    word = main if main in words else next(iter(words), "") if len(words) == 1 else ""
    return {name.removeprefix(f"{word}/"): value for name, value in scores.items() if name.startswith(f"{word}/")}


# ---------------------------------------------------------------------- probes


def probe_scores(stage: Path) -> dict[str, Score]:
    """What `lit-vlm probe --out STAGE/probe...` left in the folder of a stage: the mean over layers, and each layer."""
    scores: dict[str, Score] = {}
    for file in sorted(stage.glob("probe*/probe.json")):
        found = _json(file)
        own = [
            result
            for label, result in found["results"].items()
            if _may_be_end(step_of(Path(label)), stage)
            and (
                len(found["results"]) == 1 or stage.resolve() in (Path(label).resolve(), *Path(label).resolve().parents)
            )
        ]
        if not own:
            log.warning("%s is of no last checkpoint of this stage, and is left out: probe anew", file)
        for result in own[:1]:
            exact = (result["score_name"] or "score").lower().replace(" ", "_")
            for name, values in (("cosine", result["cosine"]), (exact, result["score"])):
                scores |= dict(_of_layers(f"probe/{found['target']}", name, values))
    return scores


def _of_layers(prefix: str, name: str, values: list[float]) -> Iterator[tuple[str, Score]]:
    if values:
        layers = {f"layer {layer}": value for layer, value in enumerate(values, 1)}
        yield f"{prefix}/{name}", Score(fmean(values), share=name != "cosine", main=True, by_kind=layers)
        for layer, value in enumerate(values, 1):
            yield f"{prefix}/layer-{layer}/{name}", Score(value, share=name != "cosine")


# ---------------------------------------------------------------------- files


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        file: the file.
        remedy: what is to be done where it holds none.

    Raises:
        ValueError: when it holds none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object: {remedy}")
    return found


def _json(file: Path) -> dict[str, Any]:
    return read_object(file, "remove it, or score the stage again")


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; nothing without a file. Answers may hold other line breaks.

    Raises:
        ValueError: for a line that is no JSON, naming the file.
    """
    if not file.is_file():
        return []
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        try:
            lines += [json.loads(text)] if text.strip() else []
        except ValueError as error:
            raise ValueError(
                f"{file} line {number} is no JSON ({error}): remove it, or ask the questions anew"
            ) from error
    return lines
