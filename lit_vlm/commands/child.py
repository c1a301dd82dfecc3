"""The process of a stage: signals go on to it, and it dies with the one that started it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from lit_vlm.core.children import GENERATION, start_lit_vlm
from lit_vlm.core.launcher import ASKING, PREEMPTED


class Stages:
    """A context in which stages run one after the other, each in a process of its own, until a signal asks to leave.

    Attributes:
        asked: name of the signal; None while none came.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._ends = False
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {one: signal.signal(one, self._note) for one in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Once a process of a job has ended with an error, the launcher signals the others, which end by themselves: the
        # exit code of the job is that of a signal otherwise.
        for one, handler in self._before.items():
            signal.signal(one, signal.SIG_IGN if self._ends else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run one stage.

        Args:
            words: arguments of `lit-vlm`.
            environment: variables besides those of this process.

        Returns:
            its exit code; `launcher.PREEMPTED` also where a signal ended it before there was anything to save.
        """
        code = PREEMPTED if self.asked is not None else self._run(words, environment)
        self._ends = code != 0
        return code

    def _run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        self._count += 1
        self._process = start_lit_vlm(words, {**environment, GENERATION: str(self._count)})
        if self.asked is not None:  # while it started
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait()
        except KeyboardInterrupt:
            self._process.send_signal(signal.SIGINT)
            return self._process.wait() or 130
        return PREEMPTED if -code in ASKING else code
