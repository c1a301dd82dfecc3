"""Tasks of a step convert one set together."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lit_vlm.data.sets.check import check_set
from lit_vlm.data.sets.convert import convert
from tests.cluster.made import SlowTexts
from tests.cluster.slurm import Slurm, until
from tests.forkserver import interpreter

LINES = 1600


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"document {number}\n" for number in range(LINES)))
    return file


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_six_tasks_on_three_nodes_convert_together_and_one_may_die(slurm: Slurm, texts: Path, tmp_path: Path) -> None:
    out, form = tmp_path / "set", f"{SlowTexts.__module__}.{SlowTexts.__name__}"
    words = f"{interpreter()} -m lit_vlm data convert {texts} {out} --form {form} --workers 1"
    flags = ("--nodes=3", "--ntasks=6")
    job = slurm.submit(tmp_path, f"srun --kill-on-bad-exit=0 {words}", *flags)
    blocks = out / "parts"
    until(lambda: len(list(blocks.glob("*/part.json"))) >= 2, 120, "no block is done", lambda: slurm.report(job))
    slurm.signal_rank(job, 4, signal.SIGKILL, "data convert")
    assert slurm.wait(job, seconds=240) == "FAILED"  # as one task was killed; the others have ended well
    said = slurm.output(job)
    assert said.count("fingerprint") == 1, said
    assert f"converting texts: 0 of {LINES:,}" in said

    convert(SlowTexts(str(texts)), tmp_path / "alone")
    assert tree(out) == tree(tmp_path / "alone")
    assert check_set(str(out), decode=False) == []

    again = slurm.submit(tmp_path, f"srun {words}", *flags)
    assert slurm.wait(again, seconds=120) == "COMPLETED"
    assert slurm.output(again).count("fingerprint") == 1
    other = slurm.submit(tmp_path, f"srun {words} --min-side 9", *flags)
    assert slurm.wait(other, seconds=120) == "FAILED"
    assert f"{out} holds the result of something else (min_side 4 → 9)" in slurm.output(other)
