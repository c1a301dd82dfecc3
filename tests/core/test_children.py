"""No process that a command started outlives it, however it ended and whenever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lit_vlm.core.children import PARENT

STARTS = """
import sys, time
from pathlib import Path
from lit_vlm.core import children
with Path(sys.argv[1]).open("wb") as log:
    process = children.start_lit_vlm(["fit", "--help"], {}, log)
Path(sys.argv[2]).write_text(str(process.pid))
time.sleep(float(sys.argv[3]))
"""


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_it_dies_with_its_parent_from_its_first_moment(seconds: float, tmp_path: Path) -> None:
    words = [sys.executable, "-c", STARTS, str(tmp_path / "log"), str(tmp_path / "pid"), str(seconds)]
    parent = subprocess.Popen(words)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    if seconds:
        parent.kill()
    parent.wait(60)
    child = int((tmp_path / "pid").read_text())
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert b"usage" not in (tmp_path / "log").read_bytes()


def test_what_it_starts_itself_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, str(os.getppid()))
    ask = "from lit_vlm.core.children import die_with_parent; die_with_parent(); import os; print(os.environ.get('%s'))"
    said = subprocess.run([sys.executable, "-c", ask % PARENT], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (0, "None\n")  # its parent is another one, which lives: a wrapper


def test_one_whose_parent_is_dead_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv(PARENT, str(gone.pid))
    ask = "from lit_vlm.core.children import die_with_parent; die_with_parent(); print('alive')"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, timeout=60)
    assert (said.returncode, said.stdout) == (-signal.SIGKILL, b"")
