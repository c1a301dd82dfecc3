"""Processes that do a sweep: those that die are replaced, errors keep their kind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import pytest

from lit_vlm.data.sets.sweepers import DEATHS, Sweepers, _run


@dataclass(frozen=True)
class Steps:
    """Makes a file for each of ten steps that has none; process `of` is killed until it died `lives` times."""

    folder: Path
    of: int = -1
    lives: int = 0

    def __call__(self, number: int) -> Iterator[int]:
        for step in range(10):
            try:
                (self.folder / f"step-{step}").touch(exist_ok=False)
            except FileExistsError:
                continue
            if number == self.of and len(list(self.folder.glob("death-*"))) < self.lives:
                (self.folder / f"step-{step}").unlink()
                (self.folder / f"death-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield step


@dataclass(frozen=True)
class Failing:
    error: BaseException

    def __call__(self, number: int) -> Iterator[int]:
        yield 0
        raise self.error


class Odd(Exception):
    """An error that does not come back from its arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
        self.second = second


def test_all_steps_are_done_by_several(tmp_path: Path) -> None:
    Sweepers(Steps(tmp_path), 2).join()
    assert len(list(tmp_path.glob("step-*"))) == 10


@pytest.mark.slow
def test_one_that_dies_is_replaced_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Sweepers(Steps(tmp_path, of=0, lives=1), 1).join()
    assert len(list(tmp_path.glob("step-*"))) == 10
    assert capsys.readouterr().err == "a worker process was ended by signal 9; another one does its block again\n"


@pytest.mark.slow
def test_deaths_have_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"died 3 times, the last one was ended by signal 9 .* take fewer --workers"):
        Sweepers(Steps(tmp_path, of=0, lives=DEATHS), 1).join()


@pytest.mark.parametrize(("error", "kind", "match"), [
    (KeyError("what"), KeyError, "what"), (Odd("one", "two"), RuntimeError, "Odd: one"),
])  # fmt: skip
def test_errors_come_back(error: Exception, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as found:
        Sweepers(Failing(error), 2).join()
    assert "raise self.error" in "".join(found.value.__notes__)


def test_none_ends_at_once(tmp_path: Path) -> None:
    Sweepers(Steps(tmp_path), 0).join()
    assert not list(tmp_path.iterdir())


def test_what_the_terminal_interrupts_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    own, theirs = Pipe(duplex=False)
    _run(Failing(KeyboardInterrupt()), 0, theirs, os.getppid())
    theirs.close()
    with pytest.raises(EOFError):
        own.recv_bytes()
    assert capsys.readouterr().err == ""
