"""The trials of a search, several at a time, until all have ended or a signal asks to leave."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout
from rich.console import Console

from lit_vlm.checkpoints.progress import now
from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.experiments.file import short_names
from lit_vlm.experiments.pool import heard, wait_or_kill
from lit_vlm.experiments.tune.file import TuneFile
from lit_vlm.experiments.tune.study import REASON, Trials, best_of, shown
from lit_vlm.experiments.tune.trial import folder_of, outcome, remove_checkpoints, start, stop, where, words_of
from lit_vlm.training.run_tags import RUN, for_children, given_tags

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

LOCK_FILE = ".lock"
LOOK = 0.3
"""Seconds between two looks at the processes of trials."""
MOST_FAILURES = 3
"""A search ends when so many trials failed and none has come to its end."""


@dataclass(frozen=True)
class Setup:
    """A search and where it runs.

    Attributes:
        file: what is searched.
        folder: folder of the search.
        stages: stages of each trial, in order.
        count: number of trials, those of earlier processes among them, but for those that failed there.
        devices: environment variables of each of the trials that run at the same time.
    """

    file: TuneFile
    folder: Path
    stages: Sequence[str]
    count: int
    devices: Sequence[Mapping[str, str]] = ({},)


class Signals:
    """A context in which the first signal that asks to leave is noted and told to trials, and the second kills them.

    Each trial is asked once: a trial that has left its training no longer handles a signal, and would die of one more.

    Attributes:
        asked: the signal; None while none came.
        processes: the trials that run.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self._telling: signal.Signals | None = None
        self._told: dict[subprocess.Popen[bytes], signal.Signals] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {one: signal.signal(one, self._note) for one in heard()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._telling = self._telling or signal.SIGTERM
        self._tell()  # where an error ends the search
        for process in self.processes:
            wait_or_kill(process)
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """Take a trial that has started, and tell it what came while it did."""
        self.processes.append(process)
        self._tell()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._telling = signal.SIGTERM if self.asked is None else signal.SIGKILL
        self.asked = self.asked or signal.Signals(number)
        self._tell()

    def _tell(self) -> None:
        if self._telling is None:
            return
        for process in self.processes:
            if self._told.get(process) != self._telling:
                self._told[process] = self._telling
                stop([process], self._telling)

    @property
    def exit_code(self) -> int:
        """Exit code of a search that was asked to leave."""
        return 130 if self.asked == signal.SIGINT else PREEMPTED


@dataclass
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    place: int
    since: str


class Search:
    """Runs the trials of a search; one process at a time may do that in a folder.

    Args:
        setup: the search.
        begin: is called once this process may work in the folder, and returns environment variables of all trials.
        console: where a line is printed when a trial starts and when it ends.
        ended: is called with each trial that has ended.
    """

    def __init__(
        self,
        setup: Setup,
        begin: Callable[[], Mapping[str, str]],
        console: Console,
        ended: Callable[[FrozenTrial], None],
    ) -> None:
        self.setup, self.console, self._begin, self._ended = setup, console, begin, ended
        self._environment: Mapping[str, str] = {}
        self._running: list[_Running] = []
        self._failures = 0
        self._left = False
        self._names = short_names(list(setup.file.search))

    def run(self) -> Trials:
        """Run what is left of the trials.

        Returns:
            all trials.

        Raises:
            ValueError: when the folder holds the search of another file, another process works in it, or the first
                trials failed and none came to its end.
            SystemExit: when a signal asked to leave; the same command goes on.
        """
        folder = self.setup.folder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK_FILE, timeout=0), Signals() as signals:
                trials = Trials(self.setup.file, folder, parallel=len(self.setup.devices) > 1)
                self._environment = self._begin()
                self._run(trials, signals)
        except Timeout:
            raise ValueError(f"another lit-vlm tune works in {folder}; choose another --out, or wait for it") from None
        return trials

    def _run(self, trials: Trials, signals: Signals) -> None:
        waiting = trials.under_way()
        done, again = len(trials.counted()), len(trials.to_try_again)
        if done or waiting or again:
            failed = f", {again} failed and may be tried again" if again else ""
            self._say(f"going on: {done} trials have ended, {len(waiting)} were under way{failed}")
        with self.console.status("") as status:
            while True:
                self._start(trials, signals, waiting)
                if not self._running:
                    break
                time.sleep(LOOK)
                status.update("; ".join(self._state(one) for one in self._running))
                for one in [one for one in self._running if one.process.poll() is not None]:
                    self._running.remove(one)
                    signals.processes.remove(one.process)
                    self._end(trials, one, signals)
        if signals.asked is not None or self._left:
            self._say("left: the same command goes on")
            raise SystemExit(signals.exit_code)

    def _start(self, trials: Trials, signals: Signals, waiting: list[Trial]) -> None:
        """Start trials on the places that are free."""
        setup = self.setup
        free = [place for place in range(len(setup.devices)) if place not in {one.place for one in self._running}]
        for place in free:
            left = setup.count - len(trials.counted()) - len(self._running)
            if signals.asked is not None or self._left or left <= 0:
                return
            trial = waiting.pop(0) if waiting else trials.next()
            folder = folder_of(setup.folder, trial.number)
            words = words_of(setup.file, setup.stages, setup.folder, trial.number, trial._trial_id, trial.params)
            name = f"{setup.folder.absolute().name}/{folder.name}"
            tags = for_children({**given_tags(), RUN: name, "trial": str(trial.number)})
            since = now()
            process = start(words, folder, {**self._environment, **tags, **setup.devices[place]})
            signals.add(process)
            self._running.append(_Running(trial, process, place, since))
            self._say(f"trial {trial.number}: {self._setting(trial.params)} starts")

    def _end(self, trials: Trials, one: _Running, signals: Signals) -> None:
        """Take down how a trial has ended; one that left in order, or was told to, goes on later."""
        setup, trial, code = self.setup, one.trial, one.process.returncode
        folder = folder_of(setup.folder, trial.number)
        if code == PREEMPTED or (code != 0 and signals.asked is not None):
            self._left = True
            self._say(f"trial {trial.number}: left in order; it goes on later")
            return
        before = best_of(trials.finished(), setup.file.better)
        found = outcome(code, folder, setup.stages, setup.file.score, one.since)
        ended = trials.end(trial, found.value, found.reason, found.failed)
        best = best_of(trials.finished(), setup.file.better)
        self._say(f"trial {trial.number}: {self._setting(trial.params)} {self._result(ended, ended == best)}")
        if setup.file.checkpoints == "best":
            for other in (before, ended):
                if other is not None and (best is None or other.number != best.number):
                    remove_checkpoints(folder_of(setup.folder, other.number), setup.stages)
        self._ended(ended)
        self._failures = 0 if code == 0 and not found.failed else self._failures + 1
        if self._failures >= MOST_FAILURES and best is None:
            raise ValueError(
                f"the first {self._failures} trials failed, the last one by: {found.reason}. See {folder}; mend what "
                "is named and give the same command again, or change the file and choose another --out"
            )

    def _result(self, ended: FrozenTrial, best: bool) -> str:
        if reason := ended.user_attrs.get(REASON):
            return f"{ended.state.name.lower()}: {reason}"
        return f"{self.setup.file.score} {ended.value:.6g}{' (best so far)' if best else ''}"

    def _setting(self, params: Mapping[str, Any]) -> str:
        return " ".join(f"{self._names[name]}={shown(value)}" for name, value in params.items())

    def _state(self, one: _Running) -> str:
        folder = folder_of(self.setup.folder, one.trial.number)
        return f"trial {one.trial.number}: {where(folder, self.setup.stages)}"

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def places(jobs: int) -> list[dict[str, str]]:
    """Environment variables of trials that run at the same time: one GPU each, or a share of the processor's cores.

    Args:
        jobs: number of trials at the same time; a single one gets all there is.

    Raises:
        ValueError: for more trials than GPUs, where there are GPUs.
    """
    from lit_vlm.core.devices import cores, visible_gpus

    if jobs == 1:
        return [{}]
    if gpus := visible_gpus():
        if jobs > len(gpus):
            raise ValueError(f"--jobs {jobs} needs as many GPUs, and there are {len(gpus)}")
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]
    threads = str(max(1, len(cores()) // jobs))
    return [{"OMP_NUM_THREADS": threads} for _ in range(jobs)]
