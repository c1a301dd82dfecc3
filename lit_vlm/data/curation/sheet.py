"""Picture sheets: some of what a step dropped beside some of what it kept."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from lit_vlm.data.curation.deciding import Decided
from lit_vlm.data.curation.selected import locate
from lit_vlm.data.records import Record, RecordError, decode_image
from lit_vlm.data.sources.base import Source

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
    dropped = _some_of_each(np.flatnonzero(codes), codes, rng)
    kept = _some_of_each(np.flatnonzero(codes == 0), codes, rng)
    figure = Figure(figsize=(2 * COLUMNS * 2.0 + 0.6, ROWS * 2.5 + 0.6))
    FigureCanvasAgg(figure)
    halves = np.asarray(figure.subfigures(1, 2, squeeze=False))[0]
    for half, entries, word in zip(halves, (dropped, kept), ("dropped", "kept"), strict=True):
        half.suptitle(f"{decided.name}: {word}", fontsize=11)
        axes = half.subplots(ROWS, COLUMNS, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, entry in zip(axes.flat, entries, strict=False):
            _show(axis, decided, int(entry), sources)
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


def _show(axis: object, decided: Decided, entry: int, sources: Sequence[Source]) -> None:
    verdict, index = decided.verdict, int(decided.candidates[entry])
    which, local = locate(np.cumsum([len(source) for source in sources]), index)
    code, value = int(verdict.codes[entry]), float(verdict.values[entry])
    what = verdict.reasons[code - 1] if code else verdict.label
    lines = [what if np.isnan(value) else f"{what}: {value:.4g}", verdict.details.get(index, "")]
    try:
        record = sources[which].record(local)
        picture = _first_picture(record, sources[which].image_folder)
    except RecordError as error:  # the file has changed since it was measured
        record, picture, lines = None, None, [*lines, error.reason]
    words = " ".join(message.text for message in record.messages).split() if record is not None else []
    text = textwrap.shorten(" ".join(words), 2 * LETTERS if picture is not None else 9 * LETTERS, placeholder=" …")
    if picture is not None:
        axis.imshow(np.asarray(picture))  # type: ignore[attr-defined]
        lines.append(text)
    else:
        axis.text(0, 1, textwrap.fill(text, LETTERS), fontsize=7, va="top", parse_math=False)  # type: ignore[attr-defined]
    told = "\n".join(textwrap.fill(line, LETTERS) for line in lines if line)
    axis.set_title(told, fontsize=7, y=-0.02, va="top", parse_math=False)  # type: ignore[attr-defined]


def _first_picture(record: Record, folder: Path) -> PILImage.Image | None:
    if not record.images:
        return None
    picture, _ = decode_image(record.images[0], folder, lambda size: SIDE / max(size))
    picture.thumbnail((SIDE, SIDE))
    return picture
