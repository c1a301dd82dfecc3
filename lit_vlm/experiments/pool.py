"""Processes of an ablation side by side: as many as there are devices, each when what it needs is done.

Several pools, on one machine or on several that share the folder, share the tasks: a task is claimed by a lease.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from lit_vlm.core.cache import PATIENCE
from lit_vlm.core.children import start_lit_vlm
from lit_vlm.core.devices import cores
from lit_vlm.core.launcher import ASKING, PREEMPTED
from lit_vlm.core.lease import Lease
from lit_vlm.core.written import write_whole

POLL = 0.25
"""Seconds between two looks at the processes."""
LOOK = 3.0
"""Seconds between two looks at what other pools have done."""
TIME_OVER = "the end of its time"
FAILED_FILE = ".failed"
"""Behind the name of a task's log: a file that tells other pools that the task has failed."""
LEAVING = (*ASKING, signal.SIGINT, signal.SIGHUP)
SAVING = 60.0
"""Seconds that processes have to save when this one breaks off by an error of its own."""


class State(Enum):
    """What a task is doing."""

    WAITING = "waiting"
    RUNNING = "running"
    ELSEWHERE = "running elsewhere"
    """By another pool, on this machine or another."""
    DONE = "done"
    FAILED = "failed"
    LEFT_OUT = "left out"
    """Because something that it needs has failed."""
    LEFT = "left"
    """In order, as a signal asked for it; it can go on."""


@dataclass(frozen=True)
class Task:
    """A command that is run once.

    Attributes:
        name: its name.
        words: its arguments of `lit-vlm`, asked for when it starts.
        log: file that gets what it prints.
        is_done: whether it has come to its end, now or in an earlier attempt.
        needs: names of tasks that are done before.
        devices: devices that it runs on.
        environment: variables besides those of this process.
        mark: notes that it has ended well, where the command does not do so itself.
    """

    name: str
    words: Callable[[], Sequence[str]]
    log: Path
    is_done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    devices: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    mark: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Slots:
    """What runs side by side.

    Attributes:
        gpus: names of the GPUs, as CUDA_VISIBLE_DEVICES has them; none for a machine without.
        jobs: processes side by side on a machine without GPUs, which share its cores.
    """

    gpus: tuple[str, ...]
    jobs: int

    @property
    def count(self) -> int:
        """Number of slots."""
        return len(self.gpus) or self.jobs

    def environment(self, taken: Sequence[int]) -> dict[str, str]:
        """Variables of a process that has some of the slots."""
        share = max(1, len(cores()) // self.count)
        given = os.environ.get("OMP_NUM_THREADS", "")  # a list of numbers is for nested loops, and stays
        threads = str(min(share, int(given))) if given.isdecimal() else given or str(share)
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[slot] for slot in taken)} if self.gpus else {}
        return {"OMP_NUM_THREADS": threads, **visible}


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    slots: list[int]
    log: IO[bytes]
    lease: Lease


class Pool:
    """A context in which tasks run side by side, until all are done or a signal asks to leave.

    A task that fails stops no other but those that need it.

    Args:
        slots: what runs side by side.
        show: called now and then, and when a state has changed.

    Attributes:
        states: name of a task → its state.
        codes: name of a task that failed → exit code.
        asked: name of the signal that asked to leave, or that time is over; None while nothing asked.
    """

    def __init__(self, slots: Slots, show: Callable[[], None]) -> None:
        self.slots, self._show = slots, show
        self.states: dict[str, State] = {}
        self.codes: dict[str, int] = {}
        self.asked: str | None = None
        self._running: dict[str, _Running] = {}
        # A lease is stale when the same object has seen it untouched for long, so the objects are kept.
        self._leases: dict[str, Lease] = {}
        self._elsewhere: set[str] = set()
        self._looked = 0.0
        self._since = time.time()
        self._free = list(range(slots.count))
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {one: signal.signal(one, self._note) for one in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():  # after an error of this process alone
            self._tell(running.process)
        for running in self._running.values():
            wait_or_kill(running.process)
            running.lease.release()
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        for running in self._running.values():
            self._tell(running.process)

    def _tell(self, process: subprocess.Popen[bytes]) -> None:
        """Have a process save and leave; Ctrl-C asks for that, too, as a terminal's signal does not reach it."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run tasks that are not done, in their order as far as what they need allows.

        Raises:
            ValueError: for a task that needs more devices than there are, before anything runs.
        """
        for task in tasks:
            if task.devices > self.slots.count:
                raise ValueError(
                    f"{task.name} trains on {task.devices} devices, and there are {self.slots.count}: lower "
                    "trainer.devices, or run it on a larger machine"
                )
        self.states |= {task.name: State.DONE if task.is_done() else State.WAITING for task in tasks}
        named = {task.name: task for task in tasks}
        while True:
            self._end(named)
            if time.monotonic() - self._looked > LOOK:
                self._look(tasks)
            self._leave_out(tasks)
            if self.asked is None:
                self._start(tasks)
            self._show()
            left = {State.WAITING, State.ELSEWHERE} & set(self._of(tasks))
            if not self._running and (self.asked is not None or not left):
                return
            time.sleep(POLL)

    def _of(self, tasks: Sequence[Task]) -> list[State]:
        return [self.states[task.name] for task in tasks]

    def _look(self, tasks: Sequence[Task]) -> None:
        """See what other pools have done, and what they gave up."""
        self._looked = time.monotonic()
        for task in tasks:
            if self.states[task.name] not in (State.WAITING, State.ELSEWHERE):
                continue
            code = _failed_since(task, self._since)
            if task.is_done():
                self.states[task.name] = State.DONE
            elif code is not None:
                self.states[task.name], self.codes[task.name] = State.FAILED, code
            else:
                self.states[task.name] = State.WAITING  # claimed anew if the other one still has it

    def _start(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            ready = self.states[task.name] is State.WAITING and all(
                self.states[need] is State.DONE for need in task.needs
            )
            if not ready:
                continue
            if task.devices > len(self._free):
                if task.name in self._elsewhere:
                    continue
                return  # a large task is not passed by smaller ones, which would let it wait for ever
            task.log.parent.mkdir(parents=True, exist_ok=True)
            lease = self._leases.setdefault(task.name, Lease(task.log.with_suffix(".lease"), PATIENCE))
            if not lease.take():
                self.states[task.name] = State.ELSEWHERE
                self._elsewhere.add(task.name)
            elif task.is_done():  # another pool has ended it since the last look
                lease.release()
                self.states[task.name] = State.DONE
            else:
                self._begin(task, lease)

    def _begin(self, task: Task, lease: Lease) -> None:
        try:
            words = task.words()
            log = task.log.open("ab")
            _failed(task).unlink(missing_ok=True)
        except (OSError, ValueError) as error:  # it fails alone
            lease.release()
            self._fail(task, 1, f"error: {error}\n")
            return
        taken = [self._free.pop(0) for _ in range(task.devices)]
        process = start_lit_vlm(words, {**self.slots.environment(taken), **task.environment}, log)
        self._running[task.name] = _Running(process, taken, log, lease)
        self.states[task.name] = State.RUNNING
        if self.asked is not None:  # while it started
            self._tell(process)

    def _end(self, named: Mapping[str, Task]) -> None:
        for name, running in list(self._running.items()):
            code = running.process.poll()
            if code is None and not running.lease.is_lost:
                continue
            if code is None:  # this process stood still for so long that another pool has taken the task over
                running.process.kill()
                running.process.wait()
            del self._running[name]
            running.log.close()
            self._free = sorted([*self._free, *running.slots])
            self._conclude(named[name], code)
            running.lease.release()

    def _conclude(self, task: Task, code: int | None) -> None:
        """The state of a task whose process has ended; None for one that is another pool's now."""
        if code == 0:
            task.mark()
        if code is None:
            self.states[task.name] = State.ELSEWHERE
        elif code == 0 and task.is_done():
            self.states[task.name] = State.DONE
        elif self.asked is not None or code == PREEMPTED:
            self.states[task.name] = State.LEFT
            if self.asked is None:  # its time is over, and so is that of the others
                self.asked = TIME_OVER
                for other in self._running.values():
                    self._tell(other.process)
        else:
            self._fail(task, code)

    def _fail(self, task: Task, code: int, said: str = "") -> None:
        """Note that a task has failed, for other pools as well."""
        self.states[task.name], self.codes[task.name] = State.FAILED, code
        with contextlib.suppress(OSError):  # a full disk
            write_whole(_failed(task), str(code))
            if said:
                with task.log.open("a", encoding="utf-8") as log:
                    log.write(said)

    def _leave_out(self, tasks: Sequence[Task]) -> None:
        for task in tasks:  # each comes behind those that it needs
            lost = any(self.states[need] in (State.FAILED, State.LEFT_OUT) for need in task.needs)
            if self.states[task.name] is State.WAITING and lost:
                self.states[task.name] = State.LEFT_OUT


def wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that was told to save and leave, and kill one that takes too long."""
    try:
        process.wait(SAVING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def heard() -> list[signal.Signals]:
    """Signals that ask this process to leave, without those that it is to ignore, as nohup asks of SIGHUP."""
    return [one for one in LEAVING if signal.getsignal(one) is not signal.SIG_IGN]


def _failed(task: Task) -> Path:
    return task.log.with_name(task.log.name + FAILED_FILE)


def _failed_since(task: Task, since: float) -> int | None:
    """The exit code with which a pool gave a task up after some moment; None where none did."""
    file = _failed(task)
    try:
        return int(file.read_text()) if file.stat().st_mtime >= since else None
    except (OSError, ValueError):  # another pool tries it again
        return None


def last_words(log: Path) -> str:
    """Why a task failed, as far as its log says: its last error, or its last line."""
    try:
        lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("(set LIT_VLM_DEBUG")]
    errors = [line for line in lines if "rror: " in line]
    return (errors or lines or [""])[-1]
