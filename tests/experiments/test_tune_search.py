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
from mlflow import MlflowClient
from rich.console import Console

from lit_vlm.commands.cli import main
from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.experiments.tune import search
from lit_vlm.experiments.tune.file import TuneFile
from lit_vlm.experiments.tune.study import KEPT_FILE, Trials
from tests.experiments.test_tune import GIVEN, RATE, written

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


# ---------------------------------------------------------------------------- whole commands


def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str, **changes: Any
) -> tuple[int, list[Mapping[str, str]]]:
    """Give `lit-vlm tune` with trials that train nothing; returns its exit code, and their variables."""
    started: list[Mapping[str, str]] = []

    def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        process = trained(folder, float(len(started)))
        (folder / "2_sft" / "config.yaml").write_text("model: {stage: {train: {decoder: 1.0e-3}}}")
        started.append(environment)
        return process

    monkeypatch.setattr(search, "start", start)
    monkeypatch.setattr(search, "LOOK", 0.02)
    rates = {"search": {RATE: {"choices": [1e-3, 1e-4]}}, "sampler": "grid", "trials": None}
    file = written(folder, **rates | {"base": {"trainer.logger": "CSVLogger"}} | changes)
    try:
        main(["tune", str(file), "--out", str(folder / "out"), *words])
    except SystemExit as left:
        return int(left.code or 0), started
    return 0, started


def test_no_more_trials_than_a_grid_has_combinations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        code, started = command(tmp_path, monkeypatch, "--trials", "1")
        assert code == 0
    assert len(started) == 0
    code, started = command(tmp_path, monkeypatch, "--trials", "9")
    assert (code, len(started)) == (0, 1)


def test_a_dry_run_counts_as_the_search_does_and_keeps_away_from_its_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(tmp_path, monkeypatch)
    folders: list[Path] = []
    monkeypatch.setattr(
        "lit_vlm.commands.run.main", lambda words: folders.append(Path(words[words.index("--out") + 1]))
    )
    assert command(tmp_path, monkeypatch, "--dry-run", "--trials", "9") == (0, [])
    assert len(folders) == 2
    assert not any(folder.exists() for folder in folders)
    assert "\n2 trials; val/loss" in capsys.readouterr().out
    command(tmp_path, monkeypatch, "--dry-run", "--trials", "1")
    assert "\n1 trials; val/loss" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [False, True])
def test_the_search_is_a_run_of_mlflow_where_flags_say_and_ends_with_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError("no space left")

    if broken:
        monkeypatch.setattr("lit_vlm.experiments.tune.report.write", fails)
    uri = f"sqlite:///{tmp_path}/own.db"
    base = {"trainer.logger.init_args.experiment_name": "mine", "trainer.logger.tracking_uri": uri}
    code, started = command(tmp_path, monkeypatch, base=base | {"trainer.logger+": "CSVLogger"})
    assert (code, [one["MLFLOW_TRACKING_URI"] for one in started]) == (int(broken), [uri] * 2)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert {one["LIT_VLM_PARENT_RUN"] for one in started} == {run.info.run_id}
    assert run.info.status == ("FAILED" if broken else "FINISHED")
    assert ("no space left" in capsys.readouterr().err) == broken


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


def test_when_the_first_trials_fail_those_that_train_are_asked_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def start(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Process:
        folders.append(folder)
        return counting(folder) if len(folders) == 1 else subprocess.Popen(["false"])

    monkeypatch.setattr(search, "start", start)
    monkeypatch.setattr(search, "LOOK", 0.05)
    with pytest.raises(ValueError, match=r"the first 3 trials failed"):
        ran(TuneFile(**GIVEN), tmp_path, jobs=4)
    assert (folders[0] / "heard").read_text() == "1"
    assert [one.number for one in Trials(TuneFile(**GIVEN), tmp_path, parallel=False).under_way()] == [0]


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


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_asks_to_leave_unless_nohup_says_otherwise(tmp_path: Path, ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with search.Signals() as signals:
            if not ignored:
                assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL  # which would end the tests
            process = counting(tmp_path / "trial")
            signals.add(process)
            signal.raise_signal(signal.SIGHUP)
            assert signals.asked == (None if ignored else signal.SIGHUP)
        assert process.returncode == PREEMPTED
        assert (tmp_path / "trial" / "heard").read_text() == "1"
    finally:
        signal.signal(signal.SIGHUP, before)


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
