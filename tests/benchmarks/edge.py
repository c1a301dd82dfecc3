"""`python -m tests.benchmarks.edge RUN`: what each kind of GGUF file costs and loses, asked of llama.cpp."""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lit_vlm.commands.named_runs import name_checkpoint
from lit_vlm.data.records import Image, Record
from lit_vlm.evaluation.asker import Asker, load_run
from lit_vlm.evaluation.held_out import held_out_scores, judge_held_out
from lit_vlm.evaluation.metrics.text import exact_match
from lit_vlm.gguf.export import Written, export_gguf
from lit_vlm.gguf.kinds import KINDS
from lit_vlm.gguf.runtime import Runtime
from lit_vlm.worlds.scenes import Scenes

COUNT, NEW_TOKENS, LONG, TOLD = 100, 8, 64, 500


@dataclass(frozen=True)
class _Asked:
    """One question, as text for llama.cpp.

    Attributes:
        prompt: with `<image>` where the picture stands.
        picture: content of its file.
        expected: the right answer.
        ids: tokens of the answer, with the one that closes it.
    """

    prompt: str
    picture: bytes
    expected: str
    ids: Sequence[int]


def _records() -> list[Record]:
    scenes = Scenes(
        "questions", COUNT, max_things=1, wording="plain", split="held_out", question_kinds=["attribute"], seed=1
    )
    return [scenes.record(index) for index in range(COUNT)]


def _asked(run: Asker, record: Record) -> _Asked:
    (sample,) = run.encode([record], "answer")
    picture = next(part for part in record.messages[0].content if isinstance(part, Image))
    assert picture.data is not None
    bos = run.spec.tokenizer.bos_token if run.spec.bos_id is not None else ""
    prompt = run.written(record).removeprefix(bos or "")
    return _Asked(prompt, picture.data, record.messages[-1].text, [label for label in sample.labels if label >= 0])


def _nats(runtime: Runtime, run: Asker, one: _Asked) -> list[float]:
    """Negative log-likelihood of each token of the right answer; of one that is not told, that of the least that is."""
    found = []
    for place, wanted in enumerate(one.ids):
        before = run.spec.tokenizer.decode(one.ids[:place])
        first = runtime.answer(one.prompt + before, [one.picture], 1, TOLD).first
        found.append(-first.get(wanted, min(first.values())))
    return found


def _row(run: Asker, written: Written, questions: Sequence[_Asked]) -> str:
    """Megabytes, exact answers, perplexity of the right ones, and tokens per second, of files on llama.cpp."""
    with Runtime(written.decoder, written.encoder) as runtime:
        start = time.perf_counter()
        answers = [runtime.answer(one.prompt, [one.picture], NEW_TOKENS, 1) for one in questions]
        seconds = (time.perf_counter() - start) / len(questions)
        nats = [value for one in questions for value in _nats(runtime, run, one)]
        long = [runtime.answer("The history of the city begins", [], LONG, 1).tokens_per_s for _ in range(3)]
    right = statistics.fmean(exact_match(a.text, one.expected) for a, one in zip(answers, questions, strict=True))
    size = (written.decoder.stat().st_size + written.encoder.stat().st_size) / 2**20
    return (
        f"{size:.0f} | {right:.1%} | {math.exp(statistics.fmean(nats)):.3f} | {statistics.median(long):.0f} | "
        f"{seconds:.2f}"
    )


def main(source: str) -> None:
    """Print a row for the kit in fp32, and one for each kind of file."""
    show = Console(width=200, highlight=False).print
    run, records = load_run(name_checkpoint(source)), _records()
    questions = [_asked(run, record) for record in records]
    scores = held_out_scores(judge_held_out(run, records, max_new_tokens=NEW_TOKENS))
    show("| weights | MiB | right | perplexity of the right answer | tokens/s | seconds per question |")
    show("|---|---:|---:|---:|---:|---:|")
    size = sum(p.numel() * p.element_size() for p in run.module.vlm.parameters()) / 2**20
    show(f"| the kit's, fp32 | {size:.0f} | {scores.exact_match:.1%} | {math.exp(scores.loss):.3f} | | |")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            written = export_gguf(run.module.vlm, run.format, run.spec, Path(scratch) / "out", kind)
            show(f"| `{kind}` | {_row(run, written, questions)} |")


if __name__ == "__main__":
    main(sys.argv[1])
