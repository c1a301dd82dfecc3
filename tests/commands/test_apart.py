"""Work in a process of its own: its result, its errors, its end by a signal."""

from __future__ import annotations

import os
import signal

import pytest

from lit_vlm.commands.apart import apart


def _die(number: int) -> None:
    os.kill(os.getpid(), number)


def _refuse(text: str) -> None:
    raise ValueError(text)


def test_the_result_comes_back() -> None:
    assert apart(str.upper, "a") == "A"


def test_an_error_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        apart(_refuse, "no such thing")
    assert "error: no such thing\n" in capfd.readouterr().err


def test_a_process_that_is_killed_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="137"):
        apart(_die, signal.SIGKILL)
    assert "error: a process was ended by SIGKILL: is memory short?\n" in capfd.readouterr().err
