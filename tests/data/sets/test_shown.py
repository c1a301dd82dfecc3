"""What progress tells of blocks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lit_vlm.core import progress
from lit_vlm.data.sets import shown
from lit_vlm.data.sets.parallel import blocks_of
from lit_vlm.data.sets.shards import block_folder, finish_block


def write(out: Path, index: int, reasons: list[str], size: int = 0) -> None:
    block_folder(out, index).mkdir(parents=True)
    finish_block(block_folder(out, index), {"bytes": size, "bad": [{"reason": reason} for reason in reasons]})


def test_bytes_per_second_and_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(shown.time, "perf_counter", lambda: clock[0])
    write(tmp_path, 0, ["too_small", "too_small"], size=10**12)
    facts = shown._Facts(tmp_path, frozenset({0}))
    clock[0] += 10
    assert facts.text() == ""
    facts.read({0})
    assert facts.text() == "2 left out (too_small 2)"  # what was written before is not of this time
    write(tmp_path, 1, ["malformed", "too_small", "missing_image", "corrupt_image"], size=25 * 10**6)
    facts.read({0, 1})
    facts.read({0, 1, 7})  # 7 was put away by another task
    assert facts.text() == "2.5 MB/s, 6 left out (too_small 3, malformed 1, missing_image 1, ...)"
    write(tmp_path, 2, [], size=25 * 10**9)
    facts.read({0, 1, 2})
    assert facts.text().startswith("2.5 GB/s, 6 left out")


def test_facts_of_many_blocks_are_read_in_portions_and_new_ones_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        write(tmp_path, index, [f"reason_{index}"])
    monkeypatch.setattr(shown, "READING", 0.0)
    facts = shown._Facts(tmp_path, frozenset({0, 1, 2}))
    facts.read(range(4))
    assert facts.text() == "1 left out (reason_3 1)"
    facts.read(range(4))
    assert facts.text() == "2 left out (reason_3 1, reason_0 1)"


def test_a_line_tells_what_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(shown, "POLL", 0.05)
    done: list[int] = []
    with shown.shown("converting", blocks_of(100, 40), tmp_path, lambda: list(done), True):
        write(tmp_path, 2, ["too_small"], size=10**6)
        done.append(2)
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "converting: 0 of 100"
    assert "converting: 20 of 100" in lines[-1]
    assert lines[-1].endswith("MB/s, 1 left out (too_small 1)")
    assert threading.active_count() == 1 or all(t.name != "progress of blocks" for t in threading.enumerate())
