"""A fork does what `python -m` does, and is gone when whoever asked for it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forkserver import interpreter
from tests.runs import environment

SHOW = """
import json, os, sys, time
import __main__
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["MLFLOW_TRACKING_URI"], sys.path[0], sys.stdin.read(),
                  __name__, __main__.__spec__.name, __main__.__file__]))
print("torch" in sys.modules, file=sys.stderr)
"""
ENDS = """
import atexit, os, signal, sys, threading, time
atexit.register(print, "at exit")
threading.Timer(0.1, print, ["thread"]).start()
how = sys.argv[1]
if how == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "raise":
    raise RuntimeError("wrong")
sys.exit({"number": 3, "text": "sorry", "nothing": None}[how])
"""


def start(folder: Path, python: str, code: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "made.py").write_text(code)
    return subprocess.run(
        [python, "-m", "made", *arguments],
        cwd=folder,
        env=environment(folder),
        input=given,
        capture_output=True,
        text=True,
    )


def test_a_fork_sees_what_a_fresh_process_sees(tmp_path: Path) -> None:
    fresh, fork = (start(tmp_path, python, SHOW, "a", "b c", given="in") for python in (sys.executable, interpreter()))
    assert json.loads(fork.stdout) == json.loads(fresh.stdout)
    assert (fresh.stderr, fork.stderr) == ("False\n", "True\n")


@pytest.mark.parametrize(
    ("how", "code"), [("number", 3), ("text", 1), ("nothing", 0), ("raise", 1), ("kill", -signal.SIGKILL)]
)
def test_a_fork_ends_as_a_fresh_process_ends(how: str, code: int, tmp_path: Path) -> None:
    fresh, fork = (start(tmp_path, python, ENDS, how) for python in (sys.executable, interpreter()))
    assert fork.returncode == fresh.returncode == code
    assert fork.stdout == fresh.stdout
    assert fork.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_killed_program_takes_its_fork_with_it(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    program = subprocess.Popen(
        [interpreter(), "-m", "made"], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    fork = int(program.stdout.readline())
    assert fork != program.pid
    program.kill()
    assert program.stdout.read() == b""  # nobody holds its standard output any more
    program.wait()
    for _ in range(500):
        if not Path(f"/proc/{fork}").exists():
            return
        time.sleep(0.01)
    pytest.fail(f"fork {fork} lives on")


def test_what_is_read_at_import_cannot_differ(tmp_path: Path) -> None:
    done = subprocess.run(
        [interpreter(), "-m", "lit_vlm"], env=os.environ | {"OMP_NUM_THREADS": "7"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "a fork cannot have another" in done.stderr
