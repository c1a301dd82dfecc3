"""Tasks that share the blocks of one folder: nobody's death matters, and the result is that of one process."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from lit_vlm.commands.cli import main
from lit_vlm.data.sets import shared
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.engine import Local, Place
from lit_vlm.data.sets.parallel import Block, blocks_of
from lit_vlm.data.sets.shards import block_folder, claim, has_block, read_block
from lit_vlm.data.sets.shared import finish_once, run_blocks
from lit_vlm.data.sources import Source
from tests.data.made import Count

RECORDS = 400


def slow(pause: float, log: Path) -> Source:
    """A source that takes its time for a record, and writes down that it was read."""

    source = Count("n", RECORDS)
    source._on_record = Slow(pause, log)
    return source


@dataclass(frozen=True)
class Slow:
    pause: float
    log: Path

    def __call__(self, index: int) -> None:
        time.sleep(self.pause)
        with self.log.open("a") as file:
            file.write(f"{index}\n")


def _convert(out: Path, number: int, total: int, workers: int, pause: float, host: str) -> None:
    shared.PATIENCE, shared.POLL = 3.0, 0.1
    if host:
        socket.gethostname = lambda: host
    with out.with_suffix(f".{number}.said").open("w") as said, redirect_stdout(said):
        convert(slow(pause, out.with_suffix(".log")), out, Local(workers, Place(number, total)))


def task(
    out: Path, number: int = 0, total: int = 1, workers: int = 0, pause: float = 0.0, host: str = ""
) -> ForkProcess:
    """A process that converts; it is forked, as loading the libraries takes longer than all that it does."""
    process = get_context("fork").Process(target=_convert, args=(out, number, total, workers, pause, host))
    process.start()
    return process


def join(*tasks: ForkProcess) -> None:
    for process in tasks:
        process.join(120)
    assert [process.exitcode for process in tasks] == [0] * len(tasks)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(Count("n", RECORDS), out)
    return tree(out)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "total", "workers"), [(0, 3, 0), (1, 2, 2), (2, 4, 0)])
def test_one_of_several_tasks_is_killed_and_the_others_write_what_one_writes(
    seed: int, total: int, workers: int, expected: dict[str, bytes], tmp_path: Path
) -> None:
    chance = random.Random(seed)
    out = tmp_path / "out"
    tasks = [task(out, number, total, workers, 0.01) for number in range(total)]
    wait_for(out.with_suffix(".log").exists)
    time.sleep(chance.uniform(0, 0.6))
    dead = tasks.pop(chance.randrange(total))
    dead.kill()
    join(*tasks)
    dead.join()
    # Its own workers, if it had any, end the block that they are at, and then see that it is gone.
    wait_for(lambda: [file.name for file in out.iterdir() if file.name[:1] == "."] == [])
    assert tree(out) == expected


def test_a_killed_worker_process_costs_its_block_and_nothing_else(expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = task(out, workers=2, pause=0.01)
    wait_for(lambda: out.with_suffix(".log").exists() and len(out.with_suffix(".log").read_text().split()) > 5)
    psutil.Process(process.pid).children()[0].kill()
    join(process)
    assert tree(out) == expected
    read = out.with_suffix(".log").read_text().split()
    assert len(set(read)) == RECORDS
    assert len(read) - RECORDS <= 32  # a block


def test_each_block_is_done_by_one_task_and_all_take_part(expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    join(*(task(out, number, 2, 0, 0.01) for number in range(2)))
    log = out.with_suffix(".log").read_text().split()
    assert sorted(map(int, log)) == list(range(RECORDS))  # no record was read twice
    assert log != list(map(str, range(RECORDS)))
    assert out.with_suffix(".0.said").read_text().startswith("converting n: 0 of 400")
    assert out.with_suffix(".1.said").read_text() == ""  # one task alone shows progress
    assert tree(out) == expected


def test_the_block_of_a_machine_that_vanished_is_taken_over_after_a_while(
    expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    gone = task(out, pause=0.2, host="elsewhere")
    wait_for(out.with_suffix(".log").exists)
    gone.kill()
    gone.join()
    assert len(list((out / "parts" / "claims").iterdir())) == 1
    begin = time.monotonic()
    join(task(out))
    assert time.monotonic() - begin > 3
    assert tree(out) == expected


def test_a_slow_task_that_lives_keeps_its_block(expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    slowly = task(out, pause=0.15, host="elsewhere")  # five seconds for a block: longer than the others' patience
    wait_for(out.with_suffix(".log").exists)
    join(slowly, task(out, 1, 2))
    assert sorted(map(int, out.with_suffix(".log").read_text().split())) == list(range(RECORDS))
    assert tree(out) == expected


def number_of(block: Block, folder: Path) -> dict[str, Any]:
    (folder / "file").write_text(str(block.index))
    return {"index": block.index}


def test_a_block_that_two_processes_did_is_kept_once(tmp_path: Path) -> None:
    out, blocks = tmp_path / "out", blocks_of(4, 2)
    claim(out, {}, 2)
    late = shared._Task(tuple(blocks), lambda device: number_of, out)

    def overtaken(block: Block, folder: Path) -> dict[str, Any]:
        late._write(block)  # as a process does that took this one for dead
        return number_of(block, folder)

    shared._Task(tuple(blocks), lambda device: overtaken, out)._write(blocks[0])
    assert read_block(out, 0) == {"index": 0}
    assert sorted(file.name for file in (out / "parts").iterdir()) == ["000000", "plan.json"]


def test_what_an_earlier_version_left_half_written_is_written_anew(tmp_path: Path) -> None:
    out, blocks = tmp_path / "out", blocks_of(4, 2)
    claim(out, {}, 2)
    block_folder(out, 1).mkdir()
    (block_folder(out, 1) / "half").write_text("x")
    run_blocks(blocks, number_of, out, "numbers")
    assert [file.name for file in sorted(block_folder(out, 1).iterdir())] == ["file", "part.json"]


def test_an_error_in_a_block_sets_it_free(tmp_path: Path) -> None:
    out, blocks = tmp_path / "out", blocks_of(6, 2)
    claim(out, {}, 2)

    def fails(block: Block, folder: Path) -> dict[str, Any]:
        if block.index == 1:
            raise RuntimeError("no memory")
        return number_of(block, folder)

    with pytest.raises(RuntimeError, match="no memory"):
        run_blocks(blocks, fails, out, "numbers")
    assert [has_block(out, index) for index in range(3)] == [True, False, False]
    assert not any((out / "parts" / "claims").iterdir())
    run_blocks(blocks, number_of, out, "numbers")
    assert all(has_block(out, index) for index in range(3))


def test_many_threads_finish_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "POLL", 0.1)
    out = tmp_path / "out"
    claim(out, {}, 2)
    calls: list[int] = []

    def finish() -> None:
        calls.append(1)
        time.sleep(0.3)
        (out / "done").write_text("x")

    threads = [threading.Thread(target=finish_once, args=(out, "done", finish)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert sorted(file.name for file in out.iterdir()) == ["done", "plan.json"]


def test_the_first_to_begin_decides_and_another_plan_is_refused(tmp_path: Path) -> None:
    found: list[int] = []

    def begin(block: int) -> None:
        found.append(claim(tmp_path / "out", {"source": "a"}, block))

    threads = [threading.Thread(target=begin, args=(size,)) for size in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["parts"]
    with pytest.raises(ValueError, match=r"unfinished work on something else \(source a → b\)"):
        claim(tmp_path / "out", {"source": "b"}, 4)


def test_a_late_task_finds_the_set_whole(expected: dict[str, bytes], tmp_path: Path) -> None:
    convert(Count("n", RECORDS), tmp_path / "out")
    convert(Count("n", RECORDS), tmp_path / "out", Local(0, Place(3, 4)))
    assert tree(tmp_path / "out") == expected


def test_too_many_bad_records_are_told_by_one_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "bad.json").write_text(json.dumps([{"image": "none.png", "conversations": turns}] * 3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main(["data", "convert", str(tmp_path / "bad.json"), str(tmp_path / "out"), "--workers", "0"])
        assert ended.value.code == 1
        assert ("none of the 3 records can be used" in capsys.readouterr().err) == (rank == "0")
    assert len((tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()) == 3


def test_check_and_stats_are_the_first_task_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(Count("n", 40), tmp_path / "out")
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        main(["data", "check", str(tmp_path / "out"), "--workers", "0"])
        assert ("is whole" in capsys.readouterr().out) == (rank == "0")
