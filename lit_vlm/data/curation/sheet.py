"""Picture sheets: some of what a step dropped beside some of what it kept."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from lit_vlm.data.curation.deciding import Decided
from lit_vlm.data.curation.selected import locate
from lit_vlm.data.curation.step import Verdict
from lit_vlm.data.curation.texts import learned_text
from lit_vlm.data.records import Record, RecordError, decode_image
from lit_vlm.data.sources.base import Source

HALVES = ("dropped", "kept")
ROWS, COLUMNS = 4, 3
"""Size of each half of a sheet, in records."""
SIDE = 200
"""Longest side of a picture on a sheet, in pixels."""
LETTERS = 28
"""Letters in a line of text under a picture."""


def draw_sheet(decided: Decided, sources: Sequence[Source], file: Path, rng: np.random.Generator) -> None:
    """Draw what a step dropped, with reason and value, beside what it kept, as a PNG file.

    Args:
        decided: what the step did.
        sources: the sources of the records.
        file: where to.
        rng: chooses the records that are shown; of what was dropped, some of each reason.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    codes = decided.verdict.codes
    figure = Figure(figsize=(2 * COLUMNS * 2.0, ROWS * 2.6))
    FigureCanvasAgg(figure)
    halves = np.asarray(figure.subfigures(1, 2, squeeze=False))[0]
    for half, entries, word in zip(halves, (np.flatnonzero(codes), np.flatnonzero(codes == 0)), HALVES, strict=True):
        half.suptitle(f"{decided.name}: {len(entries):,} {word}", fontsize=11, y=0.985)
        axes = half.subplots(ROWS, COLUMNS, squeeze=False)
        half.subplots_adjust(left=0.03, right=0.97, top=0.94, bottom=0.07, wspace=0.12, hspace=0.45)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, entry in zip(axes.flat, _some_of_each(entries, codes, rng), strict=False):
            _show(axis, decided, int(entry), sources)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, dpi=80)


def _some_of_each(entries: NDArray[np.int64], codes: NDArray[np.int8], rng: np.random.Generator) -> NDArray[np.int64]:
    """As many entries as a half holds, each reason in turn."""
    shuffled = rng.permutation(entries)
    turn = np.zeros(len(shuffled), np.int64)
    for code in np.unique(codes[shuffled]):
        of_code = codes[shuffled] == code
        turn[of_code] = np.arange(of_code.sum())
    chosen = shuffled[np.argsort(turn, kind="stable")][: ROWS * COLUMNS]
    return chosen[np.argsort(codes[chosen], kind="stable")]


def said_of(verdict: Verdict, entry: int) -> str:
    """The reason of a record that is dropped, or else what its value is, with the value; "" where there is neither."""
    code, value = int(verdict.codes[entry]), float(verdict.values[entry])
    reason = verdict.reasons[code - 1] if code else ""
    return reason if np.isnan(value) else f"{reason or verdict.label}: {value:.4g}"


def _show(axis: Any, decided: Decided, entry: int, sources: Sequence[Source]) -> None:
    """Show the first picture of a record, or its text where it has none, over what the step says of it."""
    verdict, index = decided.verdict, int(decided.candidates[entry])
    which, local = locate(np.cumsum([len(source) for source in sources]), index)
    lines = [said_of(verdict, entry), verdict.details.get(index, "")]
    try:
        record = sources[which].record(local)
        picture, text = _first_picture(record, sources[which].image_folder), _text(record)
    except RecordError as error:  # the file has changed since it was measured
        picture, text = None, f"{error.reason}: {error.detail}"
    if picture is not None:
        axis.imshow(np.asarray(picture))
    lines.append(textwrap.shorten(text, (2 if picture is not None else 12) * LETTERS, placeholder=" …"))
    told = "\n".join(textwrap.fill(line, LETTERS) for line in lines if line)
    axis.annotate(
        told,
        (0.5, 0 if picture is not None else 1),
        xycoords="axes fraction",
        xytext=(0, -4),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=7,
        parse_math=False,
    )


def _text(record: Record) -> str:
    """What is trained on; the whole text where that is nothing."""
    return learned_text(record).strip() or " ".join(message.text for message in record.messages)


def _first_picture(record: Record, folder: Path) -> PILImage.Image | None:
    if not record.images:
        return None
    picture, _ = decode_image(record.images[0], folder, lambda size: SIDE / max(size))
    picture.thumbnail((SIDE, SIDE))
    return picture
