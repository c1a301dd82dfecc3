"""The end of a run in which a process is gone, or nothing happens any more."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.utils.hooks import RemovableHandle

from lit_vlm.core.launcher import HUNG, LOST, launch
from lit_vlm.training.heartbeat import Hub, Peers, Spoke
from lit_vlm.training.mlflow_run import MLflowRun
from lit_vlm.training.mlflow_store import FAILURE
from lit_vlm.training.module import LitVLM
from lit_vlm.training.signs import Meeting, State, Verdict
from lit_vlm.training.tracking import MLflow

SLOW, SLOW_SECONDS = 4.0, 1800.0
"""What comes before the end of the first batch, and a save, may take so many times as long, and so long at least."""
GRACE = 2.0
"""Seconds in which a process may end by its own error, before it ends by that of another one."""
NAMED = 3.0
"""Seconds in which a process whose collective failed hears which other one is gone."""
TELLING, LINGER = 20.0, 5.0
"""Seconds that MLflow's store, and the other processes, have at the end."""
STACKS = signal.SIGRTMAX - 3 if sys.platform == "linux" else None
"""The signal by which a loader worker prints its stacks; nothing else uses it."""

log = logging.getLogger(__name__)


class Watchdog(L.Callback):
    """Ends a run on all its processes when one of them is gone, or when nothing happens any more, and says why.

    A process that ended, was stopped or has no network is named within `lost_after` seconds, and all others end with
    code 69: the run can go on from its last checkpoint. Where no process ends a batch, a save or a forward pass of the
    decoder for `hang_after` seconds, all print the stacks of their threads and of their loader workers, and end with
    code 70. What comes before the end of the first batch, and a save, may take four times as long, and half an hour.

    Args:
        hang_after: seconds after which a run counts as hung; null waits for ever.
        lost_after: seconds without a sign of life after which a process counts as lost.

    Raises:
        ValueError: for seconds of 0 or less, or so few for `lost_after` that a process at work would count as lost.
    """

    def __init__(self, hang_after: float | None = 1800.0, lost_after: float = 30.0) -> None:
        if hang_after is not None and hang_after <= 0:
            raise ValueError(f"watchdog.hang_after is above 0 s, or null, not {hang_after:g}")
        if lost_after < 5:
            raise ValueError(f"watchdog.lost_after is at least 5 s (signs of life come every 2 s), not {lost_after:g}")
        self.hang_after, self.lost_after = hang_after, lost_after
        self._watch: _Watch | None = None
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin to watch: processes meet, and a thread of each looks after the others."""
        peers = _meet(trainer, self.lost_after)
        self._watch = _Watch(peers, self.hang_after, partial(_before_end, trainer, peers))
        self._watch.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave in order."""
        self._leave(None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave with an error, unless it only shows that another process is gone: then the thread ends this one."""
        if isinstance(exception, SystemExit):
            self._leave(None)
            return
        if isinstance(exception, RuntimeError) and not isinstance(exception, torch.OutOfMemoryError):
            self._wait_for_news()
        first = str(exception).strip().partition("\n")[0]
        self._leave(": ".join(filter(None, (type(exception).__name__, first))))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let each forward pass of the decoder be a sign of life: also those of answers to questions."""
        self._listen(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for training, where a model is only validated."""
        self._listen(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for validation."""
        self._listen(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for validation."""
        self._listen(pl_module)

    def on_train_batch_end(self, *_: Any) -> None:
        """A sign of life."""
        self._sign(slow=False)

    def on_validation_batch_end(self, *_: Any) -> None:
        """A sign of life."""
        self._sign()

    def on_save_checkpoint(self, *_: Any) -> None:
        """A sign of life; what follows may take long."""
        self._sign(slow=True)

    def _listen(self, module: L.LightningModule) -> None:
        if self._hook is None and isinstance(module, LitVLM) and module.model is not None:
            self._hook = module.model.decoder.register_forward_hook(self._forward)

    def _forward(self, *_: Any) -> None:
        self._sign()

    def _sign(self, slow: bool | None = None) -> None:
        if self._watch is not None:
            self._watch.sign(slow)

    def _wait_for_news(self) -> None:
        if self._watch is not None and len(self._watch.peers.nodes) > 1:
            time.sleep(NAMED)

    def _leave(self, error: str | None) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._watch is not None:
            self._watch.leave(error)
            self._watch = None


class _Watch(threading.Thread):
    """The thread that looks after the other processes and after this one.

    Args:
        peers: the other processes.
        hang_after: seconds after which a run counts as hung.
        before_end: told the verdict and the exit code, before this process ends.
    """

    def __init__(self, peers: Peers, hang_after: float | None, before_end: Callable[[Verdict, int], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.peers, self.hang_after, self.before_end = peers, hang_after, before_end
        self._state = State()
        self._leaving = False
        self._error: str | None = None
        os.register_at_fork(after_in_child=self._in_worker)

    def sign(self, slow: bool | None = None) -> None:
        """Note a sign of life, and whether what follows may take long, if that changes."""
        self._state = State(self._state.signs + 1, self._state.slow if slow is None else slow)

    def leave(self, error: str | None) -> None:
        """End the thread, and let the other processes know why."""
        self._error, self._leaving = error, True
        with suppress(OSError):  # the thread has stopped
            self.peers.wake()
        self.join()

    def run(self) -> None:
        """Look until this process leaves or its end is decided; an error of this thread is no reason for an end."""
        name = self.peers.name(self.peers.rank)
        try:
            self._look()
        except Exception:
            log.warning(
                "the watchdog of %s has stopped; training goes on", self.peers.name(self.peers.rank), exc_info=True
            )
        if self._error is not None:
            name = self.peers.name(self.peers.rank)
            self.peers.tell(Verdict("failed", self.peers.rank, f"{name} failed: {self._error}"))
        self.peers.leave()

    def _look(self) -> None:
        verdict, due = None, 0.0
        while not self._leaving:
            found = self.peers.look(self._state)
            if verdict is None and (verdict := found or self._hung()) is not None:
                due = time.monotonic() + (GRACE if verdict.kind == "failed" else 0)
            if verdict is not None and time.monotonic() >= due and not self._leaving:
                code = HUNG if verdict.kind == "hung" else LOST
                try:
                    self.before_end(verdict, code)
                finally:
                    os._exit(code)

    def _hung(self) -> Verdict | None:
        peers = self.peers
        if self.hang_after is None or not peers.decides():
            return None
        allowed = max(SLOW * self.hang_after, SLOW_SECONDS) if peers.may_be_slow() else self.hang_after
        if time.monotonic() - peers.changed < allowed:
            return None
        behind = peers.behind()
        which = f", and {peers.name(behind)} is behind the others" if behind is not None else ""
        reason = f"no batch, save or forward pass has ended for {allowed:g} s{which}"
        verdict = Verdict("hung", peers.rank if behind is None else behind, reason)
        peers.tell(verdict)
        return verdict

    def _in_worker(self) -> None:
        """In a fork, such as a loader worker: keep no connection open, and print stacks when asked."""
        self.peers.close()
        if STACKS is not None:
            faulthandler.register(STACKS, file=2, all_threads=True)


def _meet(trainer: L.Trainer, silence: float) -> Peers:
    """The processes of a trainer, once all of them are connected to rank 0 or have found out that they cannot be."""
    rank, node = trainer.global_rank, launch().node
    if trainer.world_size == 1 or not dist.is_initialized():
        return Peers(0, [node], silence)
    environment = getattr(trainer.strategy, "cluster_environment", None)
    hub = Hub([""] * trainer.world_size, silence) if rank == 0 else None
    mine = (node, hub.meeting(getattr(environment, "main_address", "localhost")) if hub else None)
    all_of_them: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(all_of_them, mine)
    nodes = [one[0] for one in all_of_them]
    if hub is not None:
        hub.nodes = nodes
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):  # Lightning's would kill this process before it has said why
                thread._child_processes = []
        return hub
    meeting = Meeting(*all_of_them[0][1])
    try:
        return Spoke(rank, nodes, silence, meeting)
    except OSError as error:
        log.warning(
            "rank %d on node %s has no way to rank 0 at %s:%d (%s): if it is lost, or loses the others, nobody will "
            "know before the process group's timeout",
            rank, node, meeting.host, meeting.port, error,
        )  # fmt: skip
        return Peers(rank, nodes, silence)


def _before_end(trainer: L.Trainer, peers: Peers, verdict: Verdict, code: int) -> None:
    """Say why this process ends; once per machine, and once to MLflow. Leave nothing running."""
    left = [rank for rank in range(len(peers.nodes)) if verdict.kind == "hung" or rank != verdict.rank]
    here = [rank for rank in left if peers.nodes[rank] == peers.nodes[peers.rank]]
    if peers.rank == min(here, default=peers.rank):
        _say(f"\nwatchdog: {verdict.reason}; this run ends with code {code}")
    if verdict.kind == "hung":
        _say(f"watchdog: {peers.name(peers.rank)}: stacks of all threads")
        faulthandler.dump_traceback(2, all_threads=True)
    workers = multiprocessing.active_children()
    if verdict.kind == "hung" and STACKS is not None:
        for worker in workers:
            _say(f"watchdog: {peers.name(peers.rank)}: stacks of {worker.name} (pid {worker.pid})")
            if worker.pid is not None:  # 0 would be this process and all beside it
                with suppress(OSError):
                    os.kill(worker.pid, STACKS)
            time.sleep(0.2)
    if peers.rank == min(left, default=peers.rank):
        _at_most(TELLING, partial(_tell_mlflow, trainer, verdict.reason))
    peers.linger(LINGER)
    for worker in workers:
        worker.kill()
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)


def _tell_mlflow(trainer: L.Trainer, reason: str) -> None:
    """Set status and `failure` of the run, by a connection of its own: the main thread's may be what hangs."""
    if any(isinstance(logger, MLflow) for logger in trainer.loggers):
        with suppress(ValueError):  # the run was not opened
            run = MLflowRun.of_folder(Path(trainer.default_root_dir))
            run.tag(FAILURE, reason)
            run.end("FAILED")


def _at_most(seconds: float, work: Callable[[], None]) -> None:
    """Do something in a thread, and go on without its end if it takes too long."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _say(line: str) -> None:
    """Write a line to the standard error at once, also where a thread that is stuck holds Python's own stream."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
