"""Statistics of a converted set: lengths, image sizes, images per record; as a table and as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from lit_vlm.data.records import Record
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sets.engine import HERE, Engine
from lit_vlm.data.sets.scan import scan
from lit_vlm.data.sources.base import Source

MAX_SIZES = 4
"""Number of images of a record whose size is looked at, as a scan has a fixed number of columns."""


@dataclass(frozen=True)
class Statistics:
    """Measures of a set; each is drawn as a histogram.

    Attributes:
        name: name of the set.
        values: title of a measure → its values.
    """

    name: str
    values: dict[str, NDArray[np.float64]]


def outline_measures(record: Record, source: Source) -> list[int]:
    """Words, images, and (width, height) of the first images, 0 where there is none: `2 + 2 · MAX_SIZES` numbers."""
    sizes = [side for image in record.images[:MAX_SIZES] for side in (image.size or (0, 0))]
    words = sum(len(message.text.split()) for message in record.messages)
    return [words, len(record.images), *sizes, *[0] * (2 * MAX_SIZES - len(sizes))]


def statistics_of(source: Source, engine: Engine = HERE, encode: SampleEncoder | None = None) -> Statistics:
    """Measure a source.

    Args:
        source: a converted set, whose records know the sizes of their images.
        engine: starts the workers.
        encode: a model's encoder of samples; with it, positions per sample and visual tokens per image are added.
    """
    found = scan(source, outline_measures, 2 + 2 * MAX_SIZES, "statistics", engine)
    table: NDArray[np.float64] = found[found[:, 0] >= 0].astype(np.float64)
    sizes = table[:, 2:].reshape(-1, 2)
    sizes = sizes[sizes[:, 0] > 0]
    values: dict[str, NDArray[np.float64]] = {
        "words per record": table[:, 0],
        "images per record": table[:, 1],
    }
    if len(sizes):
        values |= {
            "image width (px)": sizes[:, 0],
            "image height (px)": sizes[:, 1],
            "aspect ratio (width / height)": sizes[:, 0] / sizes[:, 1],
        }
    if encode is not None:
        positions = scan(source, encode.measure, 2, encode.measure_key(), engine)[:, 0]
        values["positions per sample"] = positions[positions >= 0].astype(np.float64)
        pairs, counts = np.unique(sizes, axis=0, return_counts=True)
        tokens = [encode.tokens_of((int(width), int(height))) for width, height in pairs]
        if tokens:
            values["visual tokens per image"] = np.repeat(np.array(tokens, np.float64), counts)
    return Statistics(source.name, values)


def statistics_table(statistics: Statistics) -> Table:
    """A table with mean and percentiles of each measure."""
    table = Table(title=statistics.name)
    table.add_column("")
    for column in ("count", "mean", "min", "5 %", "median", "95 %", "max"):
        table.add_column(column, justify="right")
    for title, values in statistics.values.items():
        if len(values):
            row = [values.mean(), *np.percentile(values, [0, 5, 50, 95, 100])]
            table.add_row(title, f"{len(values):,}", *(f"{value:,.4g}" for value in row))
    return table


def draw(statistics: Statistics, file: Path) -> None:
    """Draw a histogram of each measure, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {title: values for title, values in statistics.values.items() if len(values)}
    columns = min(3, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (title, values) in zip(axes.flat, shown.items(), strict=False):
        high = np.percentile(values, 99)
        axis.hist(np.minimum(values, high), bins=min(40, max(1, len(np.unique(values)))), color="#3b6ea5")
        axis.set_title(f"{title}: mean {values.mean():,.4g}", fontsize=10)
        axis.set_ylabel("count")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(statistics.name)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
