"""A process that runs planned steps, each in a fork of its own, after the libraries were loaded once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from lit_vlm.planning.job import Failed, Job, Measured, job_line, read_job, read_result, result_line

LONGEST = 600
"""Seconds after which a planned step is given up."""
UNLIMITED = 1 << 43
"""Memory of a simulated device on which anything fits, to see how much a step asks for."""
RunJob = Callable[[Job], Measured | Failed]


class Simulator:
    """Runs jobs on simulated devices, or on one that is there, in a process of its own.

    Args:
        command: what starts the process that calls `serve`.
        environment: variables that it gets besides those of this process.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | environment,
            text=True,
        )

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, job: Job) -> Measured | Failed:
        """Run a job.

        Raises:
            ValueError: where the process ended, with its last words.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(job_line(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(f"the process that plans steps ended: {self._last_words()}")
        return read_result(line)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.wait()}"


class Rehearsal:
    """Runs jobs on the device of this machine, each in a new process, as CUDA cannot be used in a fork.

    Args:
        command: what starts the process that calls `serve_one`.
        environment: variables that it gets besides those of this process.
        simulator: runs jobs that ask for more memory than any device has; None where nothing can be simulated.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], simulator: Simulator | None) -> None:
        self._command, self._environment, self._simulator = command, environment, simulator

    def run(self, job: Job) -> Measured | Failed:
        """Run a job; one that is recorded runs again without that, for its time.

        Raises:
            ValueError: where the process ended, with its last words.
        """
        if self._simulator is not None and job.device.bytes >= UNLIMITED:
            return self._simulator.run(job)
        result = self._once(job)
        if isinstance(result, Measured) and job.record:
            timed = self._once(replace(job, record=False))
            result.seconds = timed.seconds if isinstance(timed, Measured) else []
        return result

    def _once(self, job: Job) -> Measured | Failed:
        with Simulator(self._command, self._environment) as process:
            return process.run(job)


def serve_one(run: RunJob, jobs: IO[str] = sys.stdin) -> None:
    """Run one job in this process; arguments as for `serve`."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    out.write(result_line(run(read_job(jobs.readline()))) + "\n")
    out.flush()


def serve(run: RunJob, jobs: IO[str] = sys.stdin) -> None:
    """Run each job that comes in, in a fork, and write its result to the standard output, a line each.

    Args:
        run: runs a job; what it prints goes nowhere.
        jobs: a job per line.
    """
    out = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    for line in iter(jobs.readline, ""):
        out.write(_forked(run, read_job(line)) + "\n")
        out.flush()


def _forked(run: RunJob, job: Job) -> str:
    """The result of a job as a line; a process that dies gives a failure, too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result"
        child = os.fork()
        if not child:
            code = 1
            try:
                if not os.environ.get("LIT_VLM_DEBUG"):
                    os.dup2(1, 2)  # notices of libraries on devices that are not there
                warnings.simplefilter("ignore")
                signal.alarm(LONGEST)
                file.write_text(result_line(run(job)), encoding="utf-8")
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    code = os.waitstatus_to_exitcode(status)
    reasons = {-9: "the machine's memory did not suffice", -14: f"it took more than {LONGEST // 60} minutes"}
    why = reasons.get(code, f"exit code {code}")
    return json.dumps({"failed": {"reason": f"the process of a planned step died: {why}"}})
