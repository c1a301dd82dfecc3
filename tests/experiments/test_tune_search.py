"""`lit-vlm tune` with processes that take the place of trainings: refusals, failures that are mended, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from rich.console import Console

from lit_vlm.commands.cli import main
from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.experiments.tune import search
from lit_vlm.experiments.tune.file import TuneFile
from lit_vlm.experiments.tune.study import KEPT_FILE, Trials
from tests.experiments.test_tune import GIVEN, written

GRID = {"search": {"a": {"choices": ["x", None]}, "b": {"choices": [1, 2]}}, "sampler": "grid", "trials": None}
POINTS = [{"a": a, "b": b} for a in ("x", None) for b in (1, 2)]
Process = subprocess.Popen[bytes]


def ran(file: TuneFile, folder: Path, jobs: int = 1) -> Trials:
    setup = search.Setup(file, folder, ["2_sft"], file.count, [{}] * jobs)
    return search.Search(setup, dict, Console(quiet=True), lambda one: None).run()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("other", ["process", "file"])
def test_a_search_that_is_refused_leaves_the_mlflow_run_of_the_folder_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    # Reports to a store that does not answer would be kept in the folder.
    known = json.dumps({"tracking_uri": "http://127.0.0.1:9", "run_id": "7", "key": "kept"}) + "\n"
    out = tmp_path / "out"
    Trials(TuneFile(**GIVEN), out, parallel=False)
    (out / "mlflow.json").write_text(known)
    lock = FileLock(out / search.LOCK_FILE)
    if other == "process":
        lock.acquire()
    changes = {"seed": 1} if other == "file" else {}
    with pytest.raises(SystemExit, match="1"):
        main(["tune", str(written(tmp_path, **changes)), "--out", str(out)])
    lock.release()
    refused = {"process": "another lit-vlm tune works in", "file": "holds the search of another file: seed was 0"}
    assert refused[other] in capsys.readouterr().err
    assert (out / "mlflow.json").read_text() == known
    assert not list(out.glob("mlflow_unsent*"))


def test_a_search_begins_once_it_has_its_folder_and_trials_get_what_that_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def begin() -> Mapping[str, str]:
        assert (tmp_path / KEPT_FILE).is_file()
        with pytest.raises(Timeout):
            FileLock(tmp_path / search.LOCK_FILE, timeout=0).acquire()
        return {"MARK": "begun"}

    def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        given.append(environment["MARK"])
        return trained(folder, 1.0)

    monkeypatch.setattr(search, "start", start)
    setup = search.Setup(TuneFile(**GIVEN), tmp_path, ["2_sft"], 1)
    search.Search(setup, begin, Console(quiet=True), lambda one: None).run()
    assert given == ["begun"]


# ---------------------------------------------------------------------------- failures


def trained(folder: Path, value: float) -> Process:
    """A process that leaves what a training leaves that has come to its end."""
    left = json.dumps({"value": value, "pruned": False, "step": 9})
    (folder / "2_sft").mkdir(parents=True)
    (folder / "2_sft" / "tuned.json").write_text(left)
    return subprocess.Popen(["true"])


def test_trials_that_failed_are_tried_again_by_the_next_command_once_and_before_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mended, started = TuneFile(**GIVEN | GRID), False, []

    def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        a, b = (words[words.index(flag) + 1] for flag in ("--a", "--b"))
        started.append({"a": {"x": "x", "null": None}[a], "b": int(b)})
        return trained(folder, float(len(started))) if mended else subprocess.Popen(["false"])

    monkeypatch.setattr(search, "start", start)
    monkeypatch.setattr(search, "LOOK", 0.02)
    for _ in range(2):  # neither goes on for ever
        with pytest.raises(ValueError, match=r"the first 3 trials failed"):
            ran(file, tmp_path)
        assert started == POINTS[:3]
        started.clear()
    mended = True
    trials = ran(file, tmp_path)
    assert started == POINTS
    assert {one.state.name for one in trials.counted()} == {"COMPLETE"}
    assert sorted(str(one.params) for one in trials.counted()) == sorted(map(str, POINTS))
    started.clear()
    assert len(ran(file, tmp_path).counted()) == 4
    assert started == []


def test_a_trial_that_is_tried_again_stands_for_the_one_that_failed(tmp_path: Path) -> None:
    file = TuneFile(**GIVEN)

    def opened() -> Trials:
        return Trials(file, tmp_path, parallel=False)

    trials = opened()
    failed = trials.next()
    trials.end(failed, None, "no such file", failed=True)
    trials.end(trials.next(), 1.0)
    assert [one.number for one in trials.counted()] == [0, 1]  # in this process the failure counts
    trials = opened()
    assert [one.number for one in trials.counted()] == [1]
    assert [one.number for one in trials.to_try_again] == [0]
    again = trials.next()
    assert (again.number, again.params) == (2, failed.params)
    trials = opened()  # as after a kill
    (again,) = trials.under_way()
    assert (again.number, again.params, trials.to_try_again) == (2, failed.params, [])
    trials.end(again, None, "still not", failed=True)
    trials = opened()
    assert [one.number for one in trials.to_try_again] == [2]
    assert [one.number for one in trials.counted()] == [1]
    trials.next()
    assert trials.next().params != failed.params


# ---------------------------------------------------------------------------- signals

COUNTS = """
import pathlib, signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
folder = pathlib.Path(sys.argv[1])
(folder / "ready").touch()
end = time.monotonic() + 20
while not heard and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(float(sys.argv[2]))  # for what else comes
(folder / "heard").write_text(str(len(heard)))
sys.exit(75)
"""


def counting(folder: Path, seconds: float = 0.5) -> Process:
    """A process that counts how often it is asked to leave, until so many seconds after the first time."""
    folder.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", COUNTS, str(folder), str(seconds)])
    while not (folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("during", [0, 1])
def test_each_trial_is_asked_to_leave_once_also_one_that_was_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: int
) -> None:
    folders: list[Path] = []

    def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        process = counting(folder)
        if len(folders) == during:
            os.kill(os.getpid(), signal.SIGUSR1)
        folders.append(folder)
        return process

    monkeypatch.setattr(search, "start", start)
    monkeypatch.setattr(search, "LOOK", 0.05)
    with pytest.raises(SystemExit, match=str(PREEMPTED)):
        ran(TuneFile(**GIVEN), tmp_path, jobs=3)
    assert [(folder / "heard").read_text() for folder in folders] == ["1"] * (during + 1)


def test_a_second_signal_kills_also_a_trial_that_was_starting(tmp_path: Path) -> None:
    before: Any = signal.getsignal(signal.SIGTERM)
    with search.Signals() as signals:
        first, second = counting(tmp_path / "first", 60), counting(tmp_path / "second", 60)
        signals.add(first)
        signal.raise_signal(signal.SIGTERM)
        assert first.poll() is None
        signal.raise_signal(signal.SIGINT)
        assert first.wait(20) == -signal.SIGKILL
        assert second.poll() is None
        signals.add(second)
        assert second.wait(20) == -signal.SIGKILL
    assert signals.exit_code == PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_just_as_a_trial_is_taken_asks_it_once(tmp_path: Path) -> None:
    class Interrupted(list[Process]):
        def append(self, process: Process) -> None:
            super().append(process)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)  # two signals at once would be one

    with search.Signals() as signals:
        signals.processes = Interrupted()
        process = counting(tmp_path / "trial", 1)
        signals.add(process)
        assert process.wait(60) == PREEMPTED
    assert (tmp_path / "trial" / "heard").read_text() == "1"
