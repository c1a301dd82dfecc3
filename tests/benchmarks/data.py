"""The data pipeline against plain ways of reading the same samples, and what does not grow with the data.

Ways take turns, and the ratio of each round is taken, as the speed of a shared machine changes from minute to minute.
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image as PILImage
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lit_vlm.core.batch import Batch, PixelSpec
from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.data import BadSamples, Converted, LlavaJson, Packed, PadSquare, Shuffled, Source, VicunaV1
from lit_vlm.data.feed.batching import Batching, GlobalBatch, Measures, Padded
from lit_vlm.data.feed.loader import Loader, SourceDataset
from lit_vlm.data.feed.plan import BatchPlan, Ordering
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sample.collate import make_rows
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.engine import Local
from lit_vlm.data.sets.scan import scan
from lit_vlm.encoders import PatchGrid
from lit_vlm.projectors.base import same_grid

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "tiny_llama"
SIDE, PATCH, CAPACITY, WORKERS, ROUNDS = 336, 14, 2048, 2, 5
MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def photo(noise: np.random.Generator, size: tuple[int, int]) -> PILImage.Image:
    """Soft shapes and grain, which as a JPEG are about as large as a photo."""
    small = PILImage.fromarray(noise.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(size, PILImage.BICUBIC)
    grain = np.asarray(small, np.int16) + noise.integers(-12, 12, (size[1], size[0], 1))
    return PILImage.fromarray(grain.clip(0, 255).astype(np.uint8))


def write_llava(folder: Path, count: int) -> Path:
    """Photos of COCO's size, a quarter larger, with conversations of mixed length; every seventh is text only."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    entries = []
    for index in range(count):
        words = [f"word{rng.randrange(500)}" for _ in range(min(300, int(rng.lognormvariate(3.5, 0.9)) + 4))]
        turns = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": " ".join(words)}]
        entry: dict[str, Any] = {"id": str(index), "conversations": turns}
        if index % 7:
            size = (1024, 768) if index % 4 == 0 else (640, 480)
            photo(noise, size).save(folder / "images" / f"{index}.jpg", quality=88)
            entry["image"] = f"images/{index}.jpg"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        entries.append(entry)
    (folder / "mix.json").write_text(json.dumps(entries))
    return folder / "mix.json"


def write_tars(mix: Path, folder: Path) -> list[str]:
    """The same samples as tars: the entry as JSON beside its picture."""
    folder.mkdir()
    entries = json.loads(mix.read_text())
    for shard in range(WORKERS * 2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for entry in entries[shard :: WORKERS * 2]:
                contents = {"json": json.dumps(entry).encode()}
                if "image" in entry:
                    contents["jpg"] = (mix.parent / entry["image"]).read_bytes()
                for suffix, content in contents.items():
                    info = tarfile.TarInfo(f"{entry['id']}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [str(file) for file in sorted(folder.glob("*.tar"))]


class Plain:
    """Decode, pad to a square, resize, normalise; write the conversation, tokenise it, mask the prompt."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(str(TOKENIZER))
        self.transform = v2.Compose(
            [
                v2.Resize((SIDE, SIDE), interpolation=v2.InterpolationMode.BICUBIC),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __call__(self, entry: dict[str, Any], picture: PILImage.Image | None) -> dict[str, Any]:
        question, answer = (turn["value"].replace("<image>", "") for turn in entry["conversations"])
        prompt = self.tokenizer(f"USER: {question} ASSISTANT:").input_ids
        ids = prompt + self.tokenizer(f" {answer}</s>", add_special_tokens=False).input_ids
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        pixels = None
        if picture is not None:
            picture = picture.convert("RGB")
            longest = max(picture.size)
            canvas = PILImage.new("RGB", (longest, longest), tuple(int(255 * channel) for channel in MEAN))
            canvas.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
            pixels = self.transform(canvas)
        return {"ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixels": pixels}


class PlainFiles(Dataset[dict[str, Any]]):
    """The LLaVA JSON and its image files, one by one."""

    def __init__(self, mix: Path) -> None:
        self.folder, self.entries, self.plain = mix.parent, json.loads(mix.read_text()), Plain()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        picture = PILImage.open(self.folder / entry["image"]) if "image" in entry else None
        return self.plain(entry, picture)


def pad(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right-padded ids and labels, pictures stacked."""
    ids = torch.nn.utils.rnn.pad_sequence([sample["ids"] for sample in samples], True)
    labels = torch.nn.utils.rnn.pad_sequence([sample["labels"] for sample in samples], True, -100)
    pixels = [sample["pixels"] for sample in samples if sample["pixels"] is not None]
    return {"ids": ids, "labels": labels, "pixels": torch.stack(pixels) if pixels else None, "count": len(samples)}


def from_tar(sample: dict[str, Any], plain: Plain) -> dict[str, Any]:
    """A sample of a tar."""
    return plain(json.loads(sample["json"]), PILImage.open(io.BytesIO(sample["jpg"])) if "jpg" in sample else None)


def spec() -> InputSpec:
    """CLIP-L/14-336 as the data side sees it."""
    grid = PatchGrid(PATCH)
    return InputSpec(load_tokenizer(str(TOKENIZER)), PixelSpec(SIDE, PATCH, MEAN), grid, same_grid)


def loader(source: Source, batching: Batching, batch_size: int, workers: int = WORKERS, seed: int = 0) -> Loader:
    """Ours, over one source."""
    encode = SampleEncoder(spec(), VicunaV1(), PadSquare(), CAPACITY, fast_jpeg=True)
    sizes = partial(scan, source, encode.measure, 2, encode.measure_key(), Local(WORKERS))
    measures = Measures(lambda: np.empty(0, np.int64), sizes, CAPACITY)
    plan = BatchPlan(Ordering([source], Shuffled(), batching, measures, seed), GlobalBatch(batch_size, 1), 0, True)
    collate = partial(make_rows, pad_id=0)
    return Loader(SourceDataset([source], encode), plan, collate, workers, 1, BadSamples(), None, False)


def ours(batches: Iterable[Batch]) -> Iterator[int]:
    """Samples of each batch."""
    for batch in batches:
        yield len(batch.samples)


def rate(run: Callable[[], Iterable[int]]) -> float:
    """Samples per second over an epoch, without the start of the workers."""
    batches = iter(run())
    next(batches)
    start, count = time.perf_counter(), 0
    for size in batches:
        count += size
    return count / (time.perf_counter() - start)


def compare(console: Console, folder: Path, count: int = 1200) -> None:
    """Samples per second of ours over two plain ways."""
    mix = write_llava(folder / "llava", count)
    tars = write_tars(mix, folder / "tars")
    start = time.perf_counter()
    convert(LlavaJson(str(mix)), folder / "set", Local(WORKERS))
    speed = count / (time.perf_counter() - start)
    console.print(f"conversion: {speed:,.0f} records/s, {WORKERS} workers, every image decoded")
    source = Converted(str(folder / "set"))
    files = DataLoader(PlainFiles(mix), 16, shuffle=True, num_workers=WORKERS, collate_fn=pad)
    shards = (
        webdataset.WebDataset(tars, shardshuffle=100)
        .shuffle(200)
        .map(partial(from_tar, plain=Plain()))
        .batched(16, collation_fn=pad)
    )
    ways: dict[str, Callable[[], Iterable[int]]] = {
        "ours, packed": lambda: ours(loader(source, Packed(), 4)),
        "ours, padded": lambda: ours(loader(source, Padded(), 16)),
        "plain files": lambda: (batch["count"] for batch in files),
        "webdataset": lambda: (batch["count"] for batch in DataLoader(shards, None, num_workers=WORKERS)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            rates[name].append(rate(way))
    for name in ("ours, packed", "ours, padded"):
        for other in ("plain files", "webdataset"):
            ratio = statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True))
            console.print(f"samples/s, {name} over {other}: {ratio:.2f}×")
    console.print(", ".join(f"{name} {statistics.median(found):.0f}/s" for name, found in rates.items()))


def fill(console: Console, count: int = 20_000) -> None:
    """Share of positions that are filled, by the plan alone, for samples of mixed length."""
    rng = random.Random(0)
    words = [min(1200, int(rng.lognormvariate(4.5, 0.9)) + 24) for _ in range(count)]
    for tokens in (196, 576):
        for capacity in (2048, 4096):
            sizes = np.array([(min(capacity, n + tokens * (i % 7 > 0)), int(i % 7 > 0)) for i, n in enumerate(words)])
            measures = Measures(lambda: np.empty(0, np.int64), lambda sizes=sizes: sizes, capacity)
            plans = []
            start = time.perf_counter()
            for rank in range(8):
                ordering = Ordering([Numbers(count)], Shuffled(), Packed(), measures, 0)
                plans.append(BatchPlan(ordering, GlobalBatch(4, 8), rank, True))
            seconds = (time.perf_counter() - start) / 8
            taken = np.array([[sizes[[p.sample for p in batch], 0].sum() for batch in plan] for plan in plans])
            full = taken.sum() / (taken.size * 4 * capacity)
            apart = (taken[:, :-1].min(0) / taken[:, :-1].max(0)).min()
            console.print(
                f"{tokens} visual tokens, rows of {capacity}: fill {full:.1%}; fewest over most tokens of 8 ranks "
                f"in a step {apart:.1%}; plan of {count:,} samples in {seconds:.2f} s"
            )


class Numbers(Source):
    """Short texts, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.name, self.count, self.image_folder = "numbers", count, Path()

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> Record:
        """A question and an answer of 5 to 60 words."""
        answer = " ".join(str(index * k % 1000) for k in range(1, 5 + index % 56))
        turns = (Message("user", (Text(f"What of {index}?"),)), Message("assistant", (Text(answer),)))
        return Record(str(index), self.name, turns)

    def fingerprint(self) -> str:
        """The arguments decide everything."""
        return f"numbers-{self.count}"


def memory() -> float:
    """MiB that this process and its workers have for themselves."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes) / 2**20


def growth(console: Console, folder: Path) -> None:
    """Start-up, memory and resume against the position in an epoch of 200,000 records."""
    count = 200_000
    start = time.perf_counter()
    convert(Numbers(count), folder / "numbers", Local(WORKERS))
    console.print(f"200,000 text records: converted at {count / (time.perf_counter() - start):,.0f}/s")
    source = Converted(str(folder / "numbers"))
    for batching in (Padded(), Packed()):
        name = type(batching).__name__
        start = time.perf_counter()
        made = loader(source, batching, 16)
        console.print(f"{name}: plan of {len(made):,} batches made in {time.perf_counter() - start:.1f} s (first time)")
        start = time.perf_counter()
        made = loader(source, batching, 16)
        first = time.perf_counter() - start
        waits = []
        for share in (0.0, 0.5, 0.95):
            resumed = loader(source, batching, 16)
            resumed.load_state_dict(resumed.state_dict() | {"batches": int(share * len(resumed))})
            start = time.perf_counter()
            next(iter(resumed))
            waits.append(time.perf_counter() - start)
        found = ", ".join(f"{wait:.2f}" for wait in waits)
        console.print(f"{name}: plan {first:.1f} s; first batch at 0, 50 and 95 % of the epoch after {found} s")
    use = []
    made = loader(source, Packed(), 4)
    seen, marks = 0, [5_000, 15_000, 30_000, 50_000]
    for batch in made:
        seen += len(batch.samples)
        if marks and seen >= marks[0]:
            marks.pop(0)
            use.append(memory())
        if not marks:
            break
    console.print(f"memory of loader and {WORKERS} workers at 5, 15, 30 and 50 thousand records: "
                  + ", ".join(f"{value:,.0f}" for value in use) + " MiB")  # fmt: skip


def main() -> None:
    """Print each figure as soon as it is measured."""
    console = Console(width=130, highlight=False)
    console.print(f"data pipeline, {WORKERS} workers: decode, transform, template, batches")
    with tempfile.TemporaryDirectory() as name:
        os.environ["LIT_VLM_CACHE"] = f"{name}/cache"
        compare(console, Path(name))
        fill(console)
        growth(console, Path(name))
