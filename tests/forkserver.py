"""Processes that need not import PyTorch and Lightning anew, for tests whose point is not a fresh start.

`interpreter()` gives a program that takes the arguments of `python -m MODULE ...` and does the same, in a fork of a
server that has imported the libraries. A fork runs the module as `__main__`, with the working folder, environment,
arguments and standard streams that the program was started with, and ends as any interpreter does; its
`sys.executable` is the program again, so that what it starts by `-m` is forked as well. Whatever is not `-m MODULE` is
given to the real interpreter. A program that is killed takes its fork with it; other signals do not reach the fork.

The server is one per process of pytest. It starts when it is first asked for, and ends with that process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
_PATHS = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
FIXED = {"PYTHONPATH": os.pathsep.join(_PATHS), "OMP_NUM_THREADS": "1"}
"""Variables that libraries read on import; the server and each program that asks for a fork must have them alike."""
QUIET = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "GIT_PYTHON_REFRESH": "quiet"}
"""Variables of the server alone: no background thread, as a fork has none of its threads; Git's as in `fit.quiet`."""
PRELOAD = (
    "lit_vlm.commands.lightning_cli",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking.context.registry",
    "alembic.migration",
    "omegaconf.grammar_visitor",
    "torch.distributed.run",
)
"""Modules that most commands import."""


@functools.cache
def interpreter() -> str:
    """Path of the program; its server is started with it."""
    scratch = tempfile.TemporaryDirectory(prefix="forks-")
    address, program = (Path(scratch.name) / name for name in ("socket", "python"))
    words = f'"{sys.executable}" -IS "{__file__}" ask "{address}" "{program}" "{sys.executable}"'
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o700)
    command = [sys.executable, "-P", __file__, "serve", str(address)]
    server = subprocess.Popen(command, env=os.environ | FIXED | QUIET, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    @atexit.register
    def end() -> None:
        server.communicate()  # closes its standard input, which ends it
        scratch.cleanup()

    return str(program)


# ----- the program -----


def die_with_parent() -> None:
    """As `lit_vlm.core.children`, which this program cannot import; the fork has the server as its parent."""
    if os.environ.pop("LIT_VLM_PARENT", None) is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def ask(address: str, program: str, python: str, *words: str) -> NoReturn:
    """Have a module run in a fork, and end as the fork ends."""
    die_with_parent()
    options = [word for word in words[:2] if word in ("-P", "-u")]
    if words[len(options) : len(options) + 1] != ("-m",):
        os.execv(python, [python, *words])
    if differ := [name for name, value in FIXED.items() if os.environ.get(name) != value]:
        sys.exit(f"a fork cannot have another {' or '.join(differ)} than its server: {FIXED}")
    module, *arguments = words[len(options) + 1 :]
    request = [program, options, module, arguments, os.getcwd(), dict(os.environ)]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        code = int(connection.recv(8) or 1)
    if code < 0:  # the fork was killed by a signal
        os.kill(os.getpid(), -code)
    sys.exit(code)


# ----- the server and its forks -----


def serve(address: str) -> NoReturn:
    """Import the libraries and answer until the standard input ends; in a fork, run what was asked for."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        for module in PRELOAD:
            importlib.import_module(module)
        assert len(os.listdir("/proc/self/task")) == 1, "a library has started threads"
        gc.freeze()  # otherwise the garbage collector would copy every page into every fork
        os.write(1, b"ready\n")
        connection = Forks().answer(listener)
    if connection is None:
        _end(0)
    _run(connection)


class Forks:
    """The running forks of the server, each with the connection that is told its exit code."""

    def __init__(self) -> None:
        self.events = select.poll()
        self.running: dict[int, tuple[int, socket.socket]] = {}  # pidfd of a fork → its process id, connection
        self.asking: dict[int, int] = {}  # descriptor of a connection → id of its fork

    def answer(self, listener: socket.socket) -> socket.socket | None:
        """Fork for each connection. Returns the connection in a fork; None in the server, when its input ends."""
        self.events.register(0, select.POLLIN)
        self.events.register(listener, select.POLLIN)
        while True:
            for ready, _ in self.events.poll():
                if ready == listener.fileno():
                    connection, _ = listener.accept()
                    if self._fork(connection) == 0:
                        return connection
                elif ready in self.running:
                    self._ended(ready)
                elif ready in self.asking:  # the program was killed
                    self.events.unregister(ready)
                    os.kill(self.asking.pop(ready), signal.SIGKILL)
                elif ready == 0:
                    for fork, _ in self.running.values():
                        os.kill(fork, signal.SIGKILL)
                    return None

    def _fork(self, connection: socket.socket) -> int:
        fork = os.fork()
        if fork == 0:
            for other in (*self.running, *self.asking):
                os.close(other)
            return fork
        ended = os.pidfd_open(fork)
        self.events.register(ended, select.POLLIN)
        self.events.register(connection, 0)  # poll reports a hang-up even for no events
        self.running[ended], self.asking[connection.fileno()] = (fork, connection), fork
        return fork

    def _ended(self, ready: int) -> None:
        fork, connection = self.running.pop(ready)
        code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        self.events.unregister(ready)
        os.close(ready)
        if self.asking.pop(connection.fileno(), None):
            self.events.unregister(connection)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(str(code).encode())
        connection.close()


def _run(connection: socket.socket) -> NoReturn:
    """Run in a fork the module that the connection names, as `python -m` would."""
    with connection:
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as file:
            program, options, module, arguments, folder, environment = json.load(file)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Lightning reads it on import, and the server may have been started for the test of another rank.
    rank_zero = importlib.import_module("lightning.fabric.utilities.rank_zero")
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    if "-P" not in options:
        sys.path.insert(0, folder)
    if "-u" in options:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.executable, sys.argv = program, ["-m", *arguments]
    code: object = None
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)  # noqa: T201 - as an interpreter does
    _end(code if isinstance(code, int) else int(code is not None))


def _end(code: int) -> NoReturn:
    """End a fork after its threads and exit functions, without a full shutdown, which would take a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    {"ask": ask, "serve": serve}[sys.argv[1]](*sys.argv[2:])
