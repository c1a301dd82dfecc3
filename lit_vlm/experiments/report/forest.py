"""The forest plot: differences with their intervals, a dot per seed, and verdicts as colour and word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_vlm.experiments.report import words
from lit_vlm.experiments.report.study import Finding, Gap, Study
from lit_vlm.experiments.statistics.verdict import Judged

COLOURS = {"shown": "#0072B2", "contradicted": "#D55E00", "undecided": "#7A7A7A", "one seed": "#7A7A7A"}
"""Told apart without seeing red or green, on white and on black."""
FARTHEST = 3.0
"""Intervals end at so many times the largest difference of a seed, as those of two seeds would hide the rest."""


@dataclass(frozen=True)
class Mark:
    """One row of the plot, in the units that its numbers are printed in.

    Attributes:
        label: what is compared.
        detail: a second line: score, or what is claimed.
        mean: the difference; positive is better, or as claimed.
        low: lower end of the interval, −∞ where there is none.
        high: its upper end.
        wide: ends of the interval that holds for all rows at once.
        seeds: the differences of single seeds.
        state: the verdict, which gives the colour.
        verdict: the word for it.
        number: difference and interval as text.
    """

    label: str
    detail: str
    mean: float
    low: float
    high: float
    wide: tuple[float, float]
    seeds: tuple[float, ...]
    state: str
    verdict: str
    number: str

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low)


@dataclass(frozen=True)
class Panel:
    """Rows that share an axis.

    Attributes:
        axis: what the axis counts.
        marks: its rows.
        left: left end of the axis.
        right: right end.
    """

    axis: str
    marks: tuple[Mark, ...]
    left: float
    right: float

    def place(self, value: float) -> float:
        """Where a value stands on the axis, from 0 to 1; what lies beyond its ends is put there."""
        return min(1.0, max(0.0, (value - self.left) / (self.right - self.left)))

    def ticks(self) -> list[float]:
        """Four to eight round values."""
        from matplotlib.ticker import MaxNLocator

        found = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(self.left, self.right)
        return [float(value) for value in found if self.left <= value <= self.right]


def panels(study: Study, findings: Sequence[Finding], gaps: Sequence[Gap]) -> list[Panel]:
    """The rows of the plot by axis: claims, or where there are none all differences to the base.

    Shares have one axis in points, and every other score has its own.
    """
    marks: dict[str, list[Mark]] = {}
    if study.claims:
        for finding in findings:
            if finding.judged is not None:
                claim = finding.claim
                mark = _mark(
                    study, claim.text, f"{claim.better} against {claim.worse}, {claim.score}", claim.score,
                    finding.judged, finding.judged.verdict,
                )  # fmt: skip
                marks.setdefault(_axis(study, claim.score, "as claimed"), []).append(mark)
    else:
        for gap in gaps:
            word = words.COMPARED.get(gap.judged.verdict, gap.judged.verdict)
            mark = _mark(study, gap.variant, gap.score, gap.score, gap.judged, word)
            marks.setdefault(_axis(study, gap.score, f"better than {study.base}"), []).append(mark)
    return [_panel(axis, rows) for axis, rows in marks.items()]


def _axis(study: Study, score: str, right: str) -> str:
    return f"points; right of the line is {right}" if study.example(score).share else f"{score}; right is {right}"


def _mark(study: Study, label: str, detail: str, score: str, judged: Judged, verdict: str) -> Mark:
    share, found = study.example(score).share, judged.difference
    scale = 100 if share else 1
    return Mark(
        label=label,
        detail=detail,
        mean=scale * found.mean,
        low=scale * found.low,
        high=scale * found.high,
        wide=(scale * judged.low, scale * judged.high),
        seeds=tuple(scale * value for value in found.by_seed.values()) if found.seeds > 1 else (),
        state=judged.verdict,
        verdict=verdict,
        number=words.gained(found, share),
    )


def _panel(axis: str, marks: Sequence[Mark]) -> Panel:
    """The rows on an axis from their lowest to their highest value, with zero in it."""
    dots = [value for mark in marks for value in (mark.mean, *mark.seeds)]
    ends = [value for mark in marks for value in (mark.low, mark.high, *mark.wide) if math.isfinite(value)]
    reach = FARTHEST * max(map(abs, dots)) or max(map(abs, ends), default=0.0) or 1.0
    left, right = max(-reach, min(0.0, *dots, *ends)), min(reach, max(0.0, *dots, *ends))
    if left == right:  # all differences are zero
        left, right = -reach, reach
    margin = 0.06 * (right - left)
    return Panel(axis, tuple(marks), left - margin, right + margin)


def draw(found: Sequence[Panel], title: str, file: Path) -> None:
    """Draw the plot into a PNG file."""
    from matplotlib.figure import Figure

    heights = [len(panel.marks) + 1.1 for panel in found]
    figure = Figure(figsize=(9.5, 0.8 + 0.52 * sum(heights)), layout="constrained")
    figure.suptitle(plain(title), fontsize=11, x=0.01, ha="left", weight="bold")
    rows = figure.subplots(len(found), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for (axes,), panel in zip(rows, found, strict=True):
        _draw_panel(axes, panel)
    figure.savefig(file, dpi=150)


def _draw_panel(axes: Any, panel: Panel) -> None:
    for row, mark in enumerate(panel.marks):
        colour, y = COLOURS[mark.state], -row
        if mark.bounded:
            style = ":" if mark.state == "one seed" else "-"
            clipped = [min(panel.right, max(panel.left, value)) for value in (*mark.wide, mark.low, mark.high)]
            axes.plot(clipped[:2], [y, y], color=colour, linewidth=1, alpha=0.6, linestyle=style)
            axes.plot(clipped[2:], [y, y], color=colour, linewidth=3, linestyle=style, solid_capstyle="butt")
        axes.plot(mark.seeds, [y + 0.22] * len(mark.seeds), "o", color=colour, markersize=3, alpha=0.7)
        axes.plot([mark.mean], [y], "D", color=colour, markersize=7)
        text = f"{mark.number}  {mark.verdict}"
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=colour)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks([-row for row in range(len(panel.marks))], [_two_lines(mark) for mark in panel.marks], fontsize=9)
    axes.set_ylim(-len(panel.marks) + 0.4, 0.6)
    axes.set_xlim(panel.left, panel.right)
    axes.set_xlabel(plain(panel.axis), fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _two_lines(mark: Mark) -> str:
    return f"{_short(mark.label)}\n{_short(mark.detail)}"


def _short(text: str, most: int = 52) -> str:
    text = " ".join(text.split())
    return plain(text if len(text) <= most else f"{text[: most - 1]}…")


def plain(text: str) -> str:
    """Text that Matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
