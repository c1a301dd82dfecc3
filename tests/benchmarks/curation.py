"""What each step of a curation finds of planted faults, and how fast hashes, vectors, clusters and searches are."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as Printed

from lit_vlm.data.curation import DualEncoder, Step
from lit_vlm.data.curation.clusters import assign, find_centres
from lit_vlm.data.curation.embeddings import unit
from lit_vlm.data.curation.hashes import content_hash, perceptual_hash, pixel_hash
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.pictures import Size
from lit_vlm.data.curation.same_pictures import (
    EmbeddingDuplicates,
    ExactDuplicates,
    PerceptualDuplicates,
    near_codes,
)
from lit_vlm.data.curation.similarity import Similarity
from lit_vlm.data.records import image_bytes, open_image
from lit_vlm.data.sets.engine import Local
from lit_vlm.data.sources import Captions
from tests.benchmarks.planted import NEAR, Planted, plant

COUNT = int(os.environ.get("LIT_VLM_CURATED", "20000"))
"""Number of pictures."""
MODEL = "made:scenes-siglip"
THRESHOLD = 0.55
"""Least similarity: chosen on 400 other scenes, where it is between those of right and of wrong descriptions."""


class Found(NamedTuple):
    """What a step found of the faults that it is for.

    Attributes:
        planted: number of records with these faults.
        dropped: number of records that it dropped for their reason.
        right: number of dropped records that have one of these faults.
        shares: fault → share of its records that were found.
    """

    planted: int
    dropped: int
    right: int
    shares: dict[str, float]

    @property
    def precision(self) -> float:
        return self.right / max(1, self.dropped)

    @property
    def recall(self) -> float:
        return self.right / self.planted


def steps_of(benchmark: Captions, encoder: DualEncoder) -> dict[str, tuple[Step, str, tuple[str, ...]]]:
    """Name → a step, the reason that is looked at, and the faults that it should find."""
    again, asked = ("copy", *NEAR), ("benchmark", "benchmark_encoded")
    against = [benchmark]
    return {
        "Size(min_side=64)": (Size(min_side=64), "min_side", ("small",)),
        f"Similarity(threshold={THRESHOLD})": (Similarity(encoder, THRESHOLD), "low_similarity", ("wrong_caption",)),
        "ExactDuplicates()": (ExactDuplicates(), "duplicate", ("copy",)),
        "PerceptualDuplicates(4, bits=64)": (PerceptualDuplicates(4, 64, against), "duplicate", again),
        "PerceptualDuplicates(16, bits=256)": (PerceptualDuplicates(16, 256, against), "duplicate", again),
        "PerceptualDuplicates(32, bits=256)": (PerceptualDuplicates(32, 256, against), "duplicate", again),
        "EmbeddingDuplicates(0.99)": (EmbeddingDuplicates(encoder, 0.99, against=against), "duplicate", again),
        "EmbeddingDuplicates(0.95)": (EmbeddingDuplicates(encoder, 0.95, against=against), "duplicate", again),
        "ExactDuplicates(against)": (ExactDuplicates(against=against), "in_benchmark", asked),
        "PerceptualDuplicates(4, 64, against)": (PerceptualDuplicates(4, 64, against), "in_benchmark", asked),
        "PerceptualDuplicates(32, 256, against)": (PerceptualDuplicates(32, 256, against), "in_benchmark", asked),
    }


def found_by_step(planted: Planted, folder: Path, workers: int = 1) -> dict[str, Found]:
    """What each step, taken by itself on all records, finds."""
    encoder = DualEncoder(MODEL)
    steps = steps_of(planted.benchmark, encoder)
    measures = [measure for step, _, _ in steps.values() for measure in step.measures()]
    start = time.perf_counter()
    table = measured([planted.source], measures, folder, Local(workers))
    asked = measured([planted.benchmark], measures, folder, Local(workers))
    Console().print(f"{len(table) / (time.perf_counter() - start):.0f} records/s with all measures, {workers} readers")
    faults, found = np.array(planted.faults), {}
    for name, (step, reason, wanted) in steps.items():
        start = time.perf_counter()
        verdict = step.decide(table, table.readable, np.random.default_rng(0), asked if step.against() else None)
        dropped = verdict.codes == 1 + verdict.reasons.index(reason)
        right = np.isin(faults, wanted)
        shares = {fault: float(dropped[faults == fault].mean()) for fault in wanted}
        found[name] = Found(int(right.sum()), int(dropped.sum()), int((dropped & right).sum()), shares)
        Console().print(f"{name}: decided in {time.perf_counter() - start:.1f} s")
    return found


def _rate(work: Callable[[], object], count: int) -> float:
    """Things per second of this process's own time, which other programs of the machine change little."""
    start = time.process_time()
    work()
    return count / (time.process_time() - start)


def rates(source: Captions) -> dict[str, float]:
    """Things per second of one core."""
    some = [source.record(index).images[0] for index in range(256)]
    contents = [image_bytes(image, source.image_folder) for image in some]
    pictures = [open_image(image, source.image_folder) for image in some]
    large = [picture.resize((448, 448)) for picture in pictures[:64]]
    encoder = DualEncoder(MODEL)
    ready = encoder.picture_inputs(pictures)
    texts = encoder.text_inputs([source.record(index).messages[-1].text for index in range(256)])
    encoder.embed(texts)
    return {
        "SHA-256 of files (4 kB)": _rate(lambda: [content_hash(content) for content in contents], 256),
        "SHA-256 of pixels, 448×448": _rate(lambda: [pixel_hash(picture) for picture in large], 64),
        "perceptual hash, 64 bits, 96×96": _rate(lambda: [perceptual_hash(picture) for picture in pictures], 256),
        "perceptual hash, 64 bits, 448×448": _rate(lambda: [perceptual_hash(picture) for picture in large], 64),
        f"preprocessing for {MODEL}": _rate(lambda: encoder.picture_inputs(pictures), 256),
        f"vectors of pictures, {MODEL}, fp32": _rate(lambda: encoder.embed(ready), 256),
        f"vectors of texts, {MODEL}, fp32": _rate(lambda: encoder.embed(texts), 256),
        **_search_rates(),
    }


def _search_rates(
    codes: int = 200_000, vectors: int = 20_000, width: int = 768, clusters: int = 1000
) -> dict[str, float]:
    rng = np.random.default_rng(0)
    random_codes = rng.integers(0, 256, (codes, 8), dtype=np.uint8)
    random_vectors = unit(rng.normal(size=(vectors, width)).astype(np.float32))
    centres: list[NDArray[np.float32]] = []
    pairs = 2.0 * vectors * clusters * width / 1e9
    k_means = _rate(lambda: centres.append(find_centres(random_vectors, clusters, 5, 0)), 1)
    assigned = _rate(lambda: assign(random_vectors, centres[0]), 1)
    grouped = _rate(lambda: near_codes(random_codes, 4), codes)
    return {
        f"groups of {codes:,} hashes, 64 bits, radius 4": grouped,
        "k-means, GFLOP/s": 5 * pairs * k_means,
        "assignment, GFLOP/s": pairs * assigned,
    }


def show_found(found: Mapping[str, Found], count: int) -> None:
    """Print precision and recall by step."""
    table = Printed(title=f"{count:,} pictures with planted faults: each step by itself")
    for column in ("step", "planted", "dropped", "precision", "recall", "of each kind"):
        table.add_column(column)
    for name, one in found.items():
        kinds = ", ".join(f"{fault} {share:.3f}" for fault, share in one.shares.items())
        table.add_row(name, str(one.planted), str(one.dropped), f"{one.precision:.3f}", f"{one.recall:.3f}", kinds)
    Console(width=220).print(table)


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as name:
        planted = plant(Path(name) / "data", COUNT)
        show_found(found_by_step(planted, Path(name) / "measures"), COUNT)
        table = Printed(title="Rates of one core, by its own time")
        for column in ("", "per second"):
            table.add_column(column)
        for what, rate in rates(planted.source).items():
            table.add_row(what, f"{rate:,.0f}")
        Console(width=120).print(table)
