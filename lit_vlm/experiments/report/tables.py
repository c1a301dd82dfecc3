"""The tables of a report, as plain text that a page, a Markdown file and a terminal print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lit_vlm.experiments.report import words
from lit_vlm.experiments.report.study import Gap, Study, not_compared
from lit_vlm.experiments.results import Run, Score
from lit_vlm.experiments.statistics.paired import Difference

NO_FLAG = "(no other flag)"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: its heading.
        head: titles of its columns; the first one names rows.
        rows: cells as text.
        note: a line below it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def markdown_table(table: Table, numbers: bool = True) -> str:
    """A table as Markdown, without title and note.

    Args:
        table: the table.
        numbers: whether the columns behind the first hold numbers, which stand to the right if there are several.
    """
    several = numbers and len(table.head) > 2
    marks = ["---", *["---:" if several else "---"] * (len(table.head) - 1)]
    rows = [table.head, marks, *table.rows]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def cell(text: str) -> str:
    """Text that is one cell and no HTML; code is left as it is."""
    if not text.startswith("`"):
        text = text.replace("<", "&lt;")
    return " ".join(text.replace("|", "\\|").split())


def scores_table(study: Study) -> Table:
    """Mean and standard deviation over seeds of each score, by variant."""
    head, rows = ["variant", "seeds"], {variant: [variant, ""] for variant in study.variants}
    chance = ["guessing", ""]
    for variant, row in rows.items():
        row[1] = " ".join(str(run.seed) for run in study.of(variant))
    for name in study.shown:
        share = study.example(name).share
        scores = {variant: [run.scores[name] for run in study.of(variant) if name in run.scores] for variant in rows}
        every = [score for found in scores.values() for score in found]
        head.append(name)
        for variant, row in rows.items():
            row.append(words.mean_of([score.value for score in scores[variant]], share))
        guessed = [score.chance for score in every if score.chance is not None]
        chance.append(words.number(fmean(guessed), share) if guessed else "")
        if any(score.shuffled is not None for score in every):
            head.append("pictures shuffled")
            chance.append("")
            for variant, row in rows.items():
                mixed = [score.shuffled for score in scores[variant] if score.shuffled is not None]
                row.append(words.mean_of(mixed, share))
    last = [tuple(chance)] if any(chance[1:]) else []
    note = "Mean ± standard deviation over seeds; shares in percent."
    if "pictures shuffled" in head:
        note += " Pictures shuffled: each question with the picture of another, which shows what needs no seeing."
    return Table("Scores", tuple(head), (*map(tuple, rows.values()), *last), note)


def gaps_table(study: Study, found: Sequence[Gap]) -> Table:
    """Every variant against the base; where there were several looks, only claims have verdicts that allow for them."""
    rows, looked = [], study.judged is not None
    for gap in found:
        share, judged, difference = study.example(gap.score).share, gap.judged, gap.judged.difference
        rows.append(
            (
                gap.variant,
                gap.score,
                "–" if looked else words.COMPARED.get(judged.verdict, judged.verdict),
                words.number(difference.mean, share, signed=True),
                words.interval(difference, share),
                words.signs(difference),
                "–" if looked else words.p_value(judged),
                words.effect(difference.effect_size),
                "–" if math.isinf(visible := judged.smallest_detectable) else words.number(visible, share),
                f"{difference.questions:,}" if difference.questions else "–",
            )
        )
    level = found[0].judged.difference.level if found else 0.95
    head = ("variant", "score", "verdict", f"against {study.base}", f"{level:.0%} interval", "seeds better", "p",
            "effect size", "smallest visible", "questions")  # fmt: skip
    note = (
        "Positive is better, also where lower scores are. p by Holm for all rows. Effect size: mean over standard "
        "deviation of seeds. Smallest visible: the true difference that these runs would find four times in five."
    )
    if looked:
        note += " Seeds were added one by one, and only claims have verdicts that allow for that."
    if lacking := {text: None for gap in found if (text := words.left_out(gap.judged.difference))}:
        note += f" Of some: {'; '.join(lacking)}."
    if without := not_compared(study):
        note += f" Not compared: {'; '.join(without)}."
    return Table(differences(study), head, tuple(rows), note)


def differences(study: Study) -> str:
    """Heading of the table of differences."""
    return f"Differences to {study.base}"


def kinds_tables(study: Study) -> list[Table]:
    """Each score by kind of question: the base's value, and what is gained or lost."""
    tables = []
    for name in study.shown:
        score = study.example(name)
        kinds = list(
            dict.fromkeys(kind for run in study.runs if name in run.scores for kind in run.scores[name].by_kind)
        )
        if len(kinds) < 2:
            continue
        rows = []
        for kind in kinds:
            values = {variant: _of_kind(study.of(variant), name, kind) for variant in study.variants}
            base = values[study.base]
            cells = [_against(values[variant], base, score, variant == study.base) for variant in study.variants]
            rows.append((kind, *cells))
        note = f"Mean over seeds; in brackets the difference to {study.base}, positive where it is better."
        tables.append(Table(f"{name} by kind of question", ("", *study.variants), tuple(rows), note))
    return tables


def _of_kind(runs: Sequence[Run], name: str, kind: str) -> float:
    values = [run.scores[name].by_kind[kind] for run in runs if name in run.scores and kind in run.scores[name].by_kind]
    return fmean(values) if values else math.nan


def _against(value: float, base: float, score: Score, is_base: bool) -> str:
    """A value, and how much better it is than the base's."""
    text = words.number(value, score.share)
    if is_base or math.isnan(value) or math.isnan(base):
        return text
    gained = value - base if score.better == "higher" else base - value
    return f"{text} ({words.number(gained, score.share, signed=True)})"


def costs_table(study: Study) -> Table:
    """What each variant takes."""
    rows = []
    for variant in study.variants:
        costs = [run.cost for run in study.of(variant)]
        rates = [cost.tokens_per_second for cost in costs if cost.tokens_per_second is not None]
        peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
        rows.append(
            (
                variant,
                str(len(costs)),
                words.hours(fmean(cost.seconds for cost in costs)),
                str(max(cost.devices for cost in costs) or "–"),
                words.hours(sum(cost.device_seconds for cost in costs)),
                "/".join(f"{steps:,}" for steps in sorted({cost.steps for cost in costs})),
                words.count(max(cost.trained for cost in costs)),
                f"{fmean(rates):,.0f}" if rates else "–",
                words.size(max(peaks, default=None)),
            )
        )
    head = ("variant", "runs", "time per run", "devices", "device time of all", "steps", "trained parameters",
            "tokens/s", "peak memory")  # fmt: skip
    note = (
        "Training alone. A stage that runs share counts in each. Trained parameters and tokens/s are those of the last "
        "stage; peak memory is that of the device, or without one of the process."
    )
    return Table("Cost", head, tuple(rows), note)


def seeds_table(study: Study) -> Table:
    """Every run by itself."""
    rows = []
    for variant in study.variants:
        for run in study.of(variant):
            cells = [
                words.number(run.scores[name].value, run.scores[name].share) if name in run.scores else "–"
                for name in study.shown
            ]
            rows.append((f"{variant}, seed {run.seed}", *cells, str(run.folder)))
    return Table("Each run", ("", *study.shown, "folder"), tuple(rows))


def settings_table(study: Study) -> Table:
    """What variants have in common, and what each says of its own."""
    settings = {variant: study.of(variant)[0].flags for variant in study.variants}
    common = [flag for flag in settings[study.base] if all(flag in flags for flags in settings.values())]
    rows = [("all", " ".join(common))] if common else []
    for variant, flags in settings.items():
        rows.append((variant, " ".join(flag for flag in flags if flag not in common) or NO_FLAG))
    return Table("Variants", ("variant", "settings"), tuple(rows))


def origin_table(study: Study, compared: Sequence[Difference]) -> Table:
    """Where the runs come from: versions, commit, data, statistics; values that runs do not share are all named."""
    lines = [(name, text) for name, text in study.about.items()]
    known: dict[str, dict[str, None]] = {}
    for run in study.runs:
        for name, text in run.origin.items():
            known.setdefault(name, {})[text] = None
    lines += [(name, " / ".join(texts)) for name, texts in sorted(known.items())]
    methods = dict.fromkeys(found.method for found in compared)
    lines += [("intervals", "; ".join(methods))] if methods else []
    return Table("Origin", ("", ""), tuple(lines))
