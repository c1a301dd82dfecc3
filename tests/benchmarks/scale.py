"""What grows with the number of records, at 33 million: lengths are drawn, and there are no pictures.

Processor time, not that of a clock, as the machines that this runs on are shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import boto3
import numpy as np
from rich.console import Console

from lit_vlm.data import Converted, LlavaJson, Packed, Shuffled
from lit_vlm.data.feed.batching import Batching, GlobalBatch, Measures, ModalityLength, Padded
from lit_vlm.data.feed.bins import Integers
from lit_vlm.data.feed.mixture import Interleaved, Mixture
from lit_vlm.data.feed.plan import BatchPlan, Ordering
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.engine import Local
from tests.benchmarks.data import Numbers, write_llava
from tests.benchmarks.measure import added_mib

RECORDS, CAPACITY, TOKENS = 33_000_000, 4096, 576
DEALT = GlobalBatch(4, 64)
PER_SHARD, PER_BLOCK = 630, 4096
"""Records of 100 KB in a shard of 64 MiB, and in a block of a conversion."""


def drawn_sizes() -> Integers:
    """Positions and images of each sample: text of mixed length, every seventh sample without a picture."""
    pictures = np.arange(RECORDS) % 7 > 0
    text = np.random.default_rng(0).lognormal(4.5, 0.9, RECORDS) + 24
    return np.stack(
        [np.minimum(CAPACITY, text + TOKENS * pictures), pictures], axis=1, dtype=np.int32, casting="unsafe"
    )


def plans(console: Console) -> None:
    """Time and memory of a plan of an epoch, until its first batch, and of the identity that checkpoints hold."""
    sizes = drawn_sizes()
    words = sizes[:, 0] * np.where(sizes[:, 1] > 0, 1, -1)
    measures = Measures(lambda: words, lambda: sizes, CAPACITY)
    sources = [Numbers(RECORDS // 2), Numbers(RECORDS - RECORDS // 2)]
    ways: list[tuple[Mixture, Batching]] = [
        (Shuffled(), Packed()),
        (Shuffled(), Packed(max_images=8)),
        (Shuffled(), ModalityLength()),
        (Shuffled(), Padded()),
        (Interleaved(), Padded()),
    ]
    console.print(f"{RECORDS:,} samples; the measures take {sizes.nbytes / 2**20:,.0f} MiB more")
    for mixture, batching in ways:
        made: list[BatchPlan] = []

        def make(mixture: Mixture = mixture, batching: Batching = batching, made: list[BatchPlan] = made) -> None:
            made.append(BatchPlan(Ordering(sources, mixture, batching, measures, 0), DEALT, 3, True))
            next(iter(made[0]))

        seconds, memory = timed(make)
        identity, _ = timed(made[0].identity)
        console.print(
            f"{mixture}, {batching}: first batch after {seconds:.1f} s, {memory:,.0f} MiB added at most; "
            f"identity {identity:.1f} s"
        )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the processor, and MiB by which the work raises the peak of memory."""
    start = time.process_time()
    memory = added_mib(work)
    return time.process_time() - start, memory


def opening(console: Console, folder: Path) -> None:
    """Opening a set of 33 million records, up to its first: indices of that many shards, of which one is there."""
    convert(Numbers(PER_SHARD), folder)
    index = json.loads((folder / "index.json").read_text())
    shards = [{**index["chunks"][0], "filename": f"chunk-{i:06d}.bin"} for i in range(RECORDS // PER_SHARD)]
    (folder / "index.json").write_text(json.dumps(index | {"chunks": shards}))
    info = json.loads((folder / "lit_vlm.json").read_text())
    records = len(shards) * PER_SHARD
    info |= {"records": records, "chunks": [PER_SHARD] * len(shards)}
    info["parts"] = [*range(PER_BLOCK, records, PER_BLOCK), records]
    (folder / "lit_vlm.json").write_text(json.dumps(info, indent=1))
    start = time.process_time()
    Converted(str(folder)).record(0)
    console.print(
        f"{records:,} records in {len(shards):,} shards: first record after {time.process_time() - start:.2f} s"
    )


@contextmanager
def bucket(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server on this machine with the set of a folder; gives the settings of its clients."""
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        address = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        options = {"endpoint_url": address, "aws_access_key_id": "a", "aws_secret_access_key": "b"}
        client = boto3.client("s3", **options)
        client.create_bucket(Bucket="sets")
        for file in folder.rglob("*"):
            if file.is_file():
                client.upload_file(str(file), "sets", f"set/{file.relative_to(folder)}")
        yield options
    finally:
        server.kill()


def read(cache: str, options: dict[str, str], indices: list[int]) -> float:
    """Seconds of a clock in which one process reads records of the set in the bucket, through a cache."""
    os.environ["LIT_VLM_CACHE"] = cache
    source = Converted("s3://sets/set", storage_options=options)
    start = time.perf_counter()
    for index in indices:
        source.record(index)
    return time.perf_counter() - start


def buckets(console: Console, folder: Path, count: int = 600) -> None:
    """Reading from a bucket with one process and with one for each of two cores, first cold, then from the cache."""
    convert(LlavaJson(str(write_llava(folder / "llava", count))), folder / "set", Local(2), shard_bytes=1 << 22)
    size = sum(file.stat().st_size for file in (folder / "set").glob("chunk-*.bin")) / 2**20
    with bucket(folder / "set") as options, get_context("spawn").Pool(2) as pool:
        order = Converted("s3://sets/set", storage_options=options).shuffled(np.random.default_rng(0)).tolist()
        for processes in (1, 2):
            for state in ("cold", "cached"):
                cache = str(folder / f"cache of {processes}")
                shares = [(cache, options, order[rank::processes]) for rank in range(processes)]
                seconds = max(pool.starmap(read, shares, chunksize=1))
                console.print(
                    f"{processes} processes, {state}: {count / seconds:,.0f} records/s, {size / seconds:,.0f} MiB/s"
                )


def main() -> None:
    """Print each figure as soon as it is measured."""
    console = Console(width=150, highlight=False)
    with tempfile.TemporaryDirectory() as name:
        os.environ["LIT_VLM_CACHE"] = f"{name}/cache"
        opening(console, Path(name) / "large")
        plans(console)
        buckets(console, Path(name))


if __name__ == "__main__":
    main()
