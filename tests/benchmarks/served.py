"""`python -m tests.benchmarks.served RUN`: tokens per second of a served run, for one client and for several."""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import PRECISION
from tests.served import serving, uri

TOKENS, ROUNDS = 24, 3
CLIENTS = (1, 4, 8, 16)


def _ask(client: OpenAI, name: str, number: int) -> tuple[float, int]:
    """Seconds until the first piece of an answer, and its tokens."""
    picture: Any = {"type": "image_url", "image_url": {"url": uri(("red", "blue", "green")[number % 3], (96, 96))}}
    text: Any = {"type": "text", "text": f"Tell me all about picture {number}."}
    start, first, tokens = time.perf_counter(), 0.0, 0
    for event in client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": [picture, text]}],
        max_tokens=TOKENS,
        temperature=2.0,  # the likeliest answers of small models are short, and drawn ones are not
        stream=True,
        stream_options={"include_usage": True},
    ):
        if not first and event.choices and event.choices[0].delta.content:
            first = time.perf_counter() - start
        if event.usage:
            tokens = event.usage.completion_tokens
    return first or time.perf_counter() - start, tokens


def main(run: str) -> None:
    """Print tokens per second and the time to a first piece, rounds of all numbers of clients in turn."""
    place = Path(run).absolute()
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in CLIENTS}
    with serving(place.parent, "serve", place.name, "--device", "cpu", "--batch-size", "8") as (_, address):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        _ask(client, place.name, 0)
        for _ in range(ROUNDS):
            for number in CLIENTS:
                start = time.perf_counter()
                with ThreadPoolExecutor(number) as pool:
                    answers = list(pool.map(lambda n: _ask(client, place.name, n), range(number)))
                total = sum(tokens for _, tokens in answers)
                waits = statistics.median(first for first, _ in answers)
                found[number].append((total / (time.perf_counter() - start), waits))
    alone = statistics.median(speed for speed, _ in found[1])
    table = Table(title=f"{place.name} on the processor, {PRECISION.name}, answers of {TOKENS} tokens at most")
    for title in ("clients", "tokens/s", "over one", "first piece after"):
        table.add_column(title, justify="right")
    for number, rounds in found.items():
        speed, wait = (statistics.median(values) for values in zip(*rounds, strict=True))
        table.add_row(str(number), f"{speed:.1f}", f"{speed / alone:.1f}", f"{wait:.2f} s")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1])
