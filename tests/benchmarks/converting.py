"""Conversion and one pass of curation against webdataset and datasets: the same pictures, verified by all.

Ways take turns. Compared is the processor time of this process and its children, which other programs of a shared
machine change little, and beside it that of a clock.
"""

from __future__ import annotations

import cProfile
import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.parquet as pq
import webdataset
from litdata.streaming.writer import BinaryWriter
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from lit_vlm.data import Captions
from lit_vlm.data.curation import measuring
from lit_vlm.data.curation.duplicates import CODE, PictureHash
from lit_vlm.data.curation.hashes import perceptual_hash
from lit_vlm.data.curation.pictures import PictureSize
from lit_vlm.data.records import image_bytes, open_image
from lit_vlm.data.sets.convert import convert, finish_set
from lit_vlm.data.sets.engine import HERE, Local
from lit_vlm.data.sets.shards import CHUNK_BYTES
from lit_vlm.data.sets.writer import BlockWriter
from lit_vlm.data.sources.converted import encode_record
from tests.benchmarks.data import photo

COUNT, WORKERS, ROUNDS, BITS = 1200, 2, 5, 256
MEASURES = (PictureSize(), PictureHash("looks", BITS))
OURS = Local(WORKERS)


class Spent(NamedTuple):
    """Seconds of the processor, of this process and its children, and of a clock."""

    processor: float
    clock: float


def write_captions(folder: Path, count: int) -> Path:
    """Photos of COCO's size, and a table with a caption of ten words for each."""
    noise = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with (folder / "captions.jsonl").open("w") as table:
        for index in range(count):
            photo(noise, (640, 480)).save(folder / "images" / f"{index}.jpg", quality=88)
            caption = " ".join(f"word{word}" for word in noise.integers(0, 500, 10))
            table.write(json.dumps({"image": f"images/{index}.jpg", "caption": caption}) + "\n")
    return folder / "captions.jsonl"


def verified(file: Path) -> bytes:
    """The bytes of a picture that decodes as a whole."""
    content = file.read_bytes()
    with PILImage.open(io.BytesIO(content)) as picture:
        picture.load()
    return content


def write_tars(table: Path, out: Path, rank: int) -> None:
    """Every `WORKERS`-th picture and its caption to tars of this process's own, so that none sends bytes to another."""
    with webdataset.ShardWriter(f"{out}/{rank}-%06d.tar", maxsize=CHUNK_BYTES, verbose=0) as tars:
        for index, line in enumerate(table.read_text().splitlines()):
            if index % WORKERS == rank:
                entry = json.loads(line)
                content = verified(table.parent / entry["image"])
                tars.write({"__key__": f"{index:06d}", "jpg": content, "txt": entry["caption"]})


def by_webdataset(table: Path, out: Path) -> None:
    """A pool whose processes verify and write."""
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        pool.starmap(write_tars, [(table, out, rank) for rank in range(WORKERS)], chunksize=1)
        pool.close()
        pool.join()


def with_bytes(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A row with its verified picture."""
    return {"image": {"bytes": verified(folder / row["image"]), "path": None}}


def by_datasets(table: Path, out: Path, write: Callable[[datasets.Dataset, Path], object]) -> None:
    """`map` with the verification, then one of the ways to write."""
    rows = datasets.Dataset.from_json(str(table), cache_dir=str(out / "cache"))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    work = partial(with_bytes, folder=table.parent)
    write(rows.map(work, features=features, num_proc=WORKERS, load_from_cache_file=False), out / "set")


def by_lit_vlm(table: Path, out: Path, engine: Local = OURS) -> None:
    """What `lit-vlm data convert` does."""
    convert(Captions(str(table)), out / "set", engine)


def measure_lit_vlm(table: Path, out: Path, engine: Local = OURS) -> None:
    """What the first pass of `lit-vlm data curate` does for `Size` and `PerceptualDuplicates`."""
    measuring.measured([Captions(str(table))], MEASURES, out / "measures", engine).column(MEASURES[1], CODE)


def facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Size and perceptual hash of a row's picture, by the same function."""
    picture = row["image"].convert("RGB")
    return {"width": picture.width, "height": picture.height, "code": perceptual_hash(picture, BITS).tobytes()}


def measure_datasets(table: Path, out: Path) -> None:
    """`map` over files that datasets decodes, to columns of its cache."""
    rows = datasets.Dataset.from_json(str(table), cache_dir=str(out / "cache"))
    files = rows.map(lambda row: {"image": str(table.parent / row["image"])}, load_from_cache_file=False)
    pictures = files.cast_column("image", datasets.Image())
    found = pictures.map(facts, num_proc=WORKERS, remove_columns=pictures.column_names, load_from_cache_file=False)
    found.with_format("numpy")["code"][:]


def spent(work: Callable[[Path], object], folder: Path) -> Spent:
    """What some work takes that writes to a new folder; the folder goes afterwards, which is not counted."""
    folder.mkdir()
    clock, processor = time.perf_counter(), _processor()
    work(folder)
    found = Spent(_processor() - processor, time.perf_counter() - clock)
    shutil.rmtree(folder)
    return found


def _processor() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def compare(console: Console, title: str, ways: Mapping[str, Callable[[Path], object]], folder: Path) -> None:
    """Print what each way takes, and its ratio to the first."""
    found: dict[str, list[Spent]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, way in ways.items():
            one = spent(way, folder / "out")
            if turn:  # the first round warms up
                found[name].append(one)
    table = Table(title=f"{title}: {COUNT:,} pictures, {WORKERS} workers, medians of {ROUNDS} rounds")
    for column in ("", "processor, ms each", "× ours (lowest, highest)", "pictures/s by a clock", "× ours"):
        table.add_column(column, justify="right" if column else "left")
    base = found[next(iter(ways))]
    for name, own in found.items():
        ratios = sorted(a.processor / b.processor for a, b in zip(own, base, strict=True))
        speeds = [b.clock / a.clock for a, b in zip(own, base, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(one.processor for one in own) / COUNT * 1000:.2f}",
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})",
            f"{COUNT / statistics.median(one.clock for one in own):,.0f}",
            f"{statistics.median(speeds):.2f}",
        )
    console.print(table)


def profile(
    console: Console, title: str, work: Callable[[], object], parts: Mapping[str, Sequence[Callable[..., Any]]]
) -> None:
    """Print the milliseconds of a picture that functions take, with all that they call, and what is left.

    Args:
        console: prints.
        title: of the line.
        work: done in this process.
        parts: name → functions; those after the first are called by the first, and not counted with it.
    """
    profiler = cProfile.Profile(time.thread_time)
    start = time.thread_time()
    profiler.runcall(work)
    whole = time.thread_time() - start
    times = {entry.code: entry.totaltime for entry in profiler.getstats()}
    taken = {
        name: times[first.__code__] - sum(times[other.__code__] for other in others)
        for name, (first, *others) in parts.items()
    }
    taken["the rest"] = whole - sum(taken.values())
    told = ", ".join(f"{name} {seconds / COUNT * 1000:.2f} ({seconds / whole:.0%})" for name, seconds in taken.items())
    console.print(f"{title}, one process under a profiler, ms each of {whole / COUNT * 1000:.2f}: {told}")


def same_codes(table: Path, folder: Path) -> None:
    """Refuse to compare ways that do not find the same hashes."""
    measured = measuring.measured([Captions(str(table))], MEASURES, folder / "ours").column(MEASURES[1], CODE)
    files = [table.parent / json.loads(line)["image"] for line in table.read_text().splitlines()[:50]]
    for code, file in zip(measured, files, strict=False):
        assert code.tobytes() == facts({"image": PILImage.open(file)})["code"], file


def main() -> None:
    """Print both comparisons, and where our own time goes."""
    console = Console(width=150, highlight=False)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        os.environ["LIT_VLM_CACHE"] = f"{name}/cache"
        folder = Path(name)
        table = write_captions(folder / "pictures", COUNT)
        same_codes(table, folder)
        conversions: dict[str, Callable[[Path], object]] = {
            "lit-vlm data convert": lambda out: by_lit_vlm(table, out),
            "webdataset.ShardWriter in a pool": lambda out: by_webdataset(table, out),
            "datasets: map, to_parquet": lambda out: by_datasets(
                table, out, lambda rows, target: rows.to_parquet(str(target))
            ),
            "datasets: map, save_to_disk": lambda out: by_datasets(
                table, out, lambda rows, target: rows.save_to_disk(str(target))
            ),
        }
        compare(console, "conversion", conversions, folder)
        passes: dict[str, Callable[[Path], object]] = {
            "measures of lit-vlm data curate": lambda out: measure_lit_vlm(table, out),
            "datasets: map": lambda out: measure_datasets(table, out),
        }
        compare(console, f"size and perceptual hash, {BITS} bits", passes, folder)
        both: dict[str, Sequence[Callable[..., Any]]] = {"read": (image_bytes,), "decode": (open_image,)}
        writing = {
            "item": (encode_record,),
            "write": (BinaryWriter.add_item,),
            "shards": (BinaryWriter.done,),
            "SHA-256 and counts": (BlockWriter.add, encode_record, BinaryWriter.add_item),
            "merge": (finish_set,),
        }
        profile(console, "conversion", lambda: by_lit_vlm(table, folder / "a", HERE), both | writing)
        hashing = {"hash": (perceptual_hash,), "write": (pq.write_table,)}
        profile(console, "measures", lambda: measure_lit_vlm(table, folder / "b", HERE), both | hashing)
