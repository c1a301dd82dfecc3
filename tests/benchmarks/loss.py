"""Peak memory and time of the next-token loss against full logits, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from lit_vlm.core.losses import chunk_rows, next_token_loss
from tests.benchmarks.measure import added_mib

POSITIONS, WIDTH, VOCAB, DENSITY = 4096, 512, 49152, 0.2


def measure(kind: str, queue: Any) -> None:
    """Forward and backward; puts (MiB above the inputs, seconds)."""
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    labels = torch.randint(VOCAB, (POSITIONS,))
    supervised = torch.rand(POSITIONS) < DENSITY
    labels[~supervised] = -100
    head.weight.grad = torch.zeros_like(head.weight)

    def both_ways() -> None:
        if kind == "full logits":
            loss = F.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction="sum")
        else:
            places = supervised.nonzero()[:, 0]
            chunk = chunk_rows(VOCAB) if kind == "supervised, in chunks" else POSITIONS
            loss = next_token_loss(hidden[places], labels[places], head, [head.weight], chunk)
        loss.backward()

    start = time.perf_counter()
    used = added_mib(both_ways)
    queue.put((used, time.perf_counter() - start))


def main() -> None:
    """Print the table."""
    kinds = ("full logits", "supervised only", "supervised, in chunks")
    results = {}
    for kind in kinds:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=measure, args=(kind, queue))
        process.start()
        results[kind] = queue.get()
        process.join()
    table = Table(title=f"next-token loss, {POSITIONS} positions, {DENSITY:.0%} supervised, d {WIDTH}, v {VOCAB}, fp32")
    for column in ("", "peak MiB", "ratio", "time ratio"):
        table.add_column(column, justify="left" if not column else "right")
    base = results[kinds[0]]
    for kind in kinds:
        memory, elapsed = results[kind]
        table.add_row(kind, f"{memory:.0f}", f"{memory / base[0]:.2f}", f"{elapsed / base[1]:.2f}")
    Console(width=130).print(table)
