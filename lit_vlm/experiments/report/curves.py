"""Curves by step: a line per variant, the mean over seeds, in a band from the lowest to the highest seed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_vlm.experiments.report.forest import plain
from lit_vlm.experiments.report.study import Study

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#8C6D31", "#8A5CD6", "#7A7A7A", "#C0392B")
STYLES = ("solid", "dashed", "dotted")
"""Of lines, in turn where there are more variants than colours."""
MOST_POINTS = 60
MOST_CURVES = 6
INK = "#010203"
"""Colour of text and axes in SVG, which the page replaces by that of its own text, in light and dark."""
FIRST = ("train/loss", "val/loss")


@dataclass(frozen=True)
class Line:
    """A variant's curve: arrays [points]."""

    variant: str
    colour: str
    style: str
    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def curves(study: Study) -> dict[str, list[Line]]:
    """Name of a metric → a line for each variant: losses, then what was scored on the way."""
    names = {name for run in study.runs for name, points in run.curves.items() if len(points) > 1}
    other = sorted(name for name in names if name.startswith("task/"))
    chosen = [*(name for name in FIRST if name in names), *other][:MOST_CURVES]
    looks = {
        variant: (COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)])
        for index, variant in enumerate(study.variants)
    }
    found: dict[str, list[Line]] = {}
    for name in chosen:
        for variant, look in looks.items():
            lines = [run.curves[name] for run in study.of(variant) if len(run.curves.get(name, ())) > 1]
            if lines:
                found.setdefault(name, []).append(_line(variant, *look, lines))
    return found


def _line(variant: str, colour: str, style: str, runs: Sequence[Sequence[tuple[int, float]]]) -> Line:
    """Mean, lowest and highest seed in bins of steps."""
    every = sorted({step for points in runs for step, _ in points})
    edges = np.linspace(every[0], every[-1] + 1, min(MOST_POINTS, len(every)) + 1)
    table = np.full((len(runs), len(edges) - 1), np.nan)
    for row, points in zip(table, runs, strict=True):
        steps, values = np.array(points, dtype=np.float64).T
        places = np.searchsorted(edges, steps, side="right") - 1
        for place in np.unique(places):
            row[place] = values[places == place].mean()
    kept = ~np.isnan(table).all(axis=0)
    table, middle = table[:, kept], ((edges[:-1] + edges[1:]) / 2)[kept]
    return Line(
        variant, colour, style, middle, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    )


def draw(found: dict[str, list[Line]], file: Path) -> None:
    """Draw all curves into a PNG file."""
    from matplotlib.figure import Figure

    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows + 0.5), layout="constrained")
    for index, (name, lines) in enumerate(found.items()):
        _draw(figure.add_subplot(rows, columns, index + 1), name, lines, "#222222")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


def svg(name: str, lines: Sequence[Line]) -> str:
    """One metric's curves as SVG, without a legend, to stand in a page in light and in dark."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.0), layout="constrained")
    _draw(figure.add_subplot(), name, lines, INK)
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same page for the same curves
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return target.getvalue().partition("<svg")[2].join(["<svg", ""]).replace(INK, "currentColor")


def _draw(axes: Any, name: str, lines: Sequence[Line], ink: str) -> None:
    for line in lines:
        axes.fill_between(line.steps, line.low, line.high, color=line.colour, alpha=0.18, linewidth=0)
        axes.plot(
            line.steps, line.mean, color=line.colour, linewidth=1.6, linestyle=line.style, label=plain(line.variant)
        )
    axes.set_title(plain(name), fontsize=10, loc="left", color=ink)
    axes.set_xlabel("optimizer step", fontsize=9, color=ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.tick_params(labelsize=8, colors=ink)
