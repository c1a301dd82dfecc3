"""All checks in processes that take each other for machines; one of them is ill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import lit_vlm
from lit_vlm.commands.cli import main
from tests.forkserver import FIXED, interpreter
from tests.machines.test_meeting import free_port
from tests.tiny import ROOT


class Job:
    """Processes of a launch, each of which is a machine, n1 and so on.

    Args:
        folder: its subfolder of a rank's name is that rank's working folder.
        world_size: number of processes that the launch has.
    """

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder, self.world_size, self.port = folder, world_size, free_port()
        self.ranks: dict[int, subprocess.Popen[str]] = {}
        for rank in range(world_size):
            (folder / str(rank)).mkdir()

    def start(self, ranks: Sequence[int], *flags: str, before: Sequence[str] = ("-m", "lit_vlm"), python: str = "",
              variables: Mapping[str, str] | None = None) -> None:  # fmt: skip
        for rank in ranks:
            given = {"RANK": str(rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": "0",
                     "SLURMD_NODENAME": f"n{rank + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port),
                     "LIT_VLM_CACHE": str(self.folder / "cache")}  # fmt: skip
            words = [python or interpreter(), *before, "doctor", "--nodes", "--size", "1MiB", *flags]
            self.ranks[rank] = subprocess.Popen(
                words, env=os.environ | FIXED | given | (variables or {}), cwd=self.folder / str(rank),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip

    def end(self) -> dict[int, tuple[int, str, str]]:
        """Exit code, output and errors of each rank."""
        said = {rank: process.communicate(timeout=180) for rank, process in self.ranks.items()}
        return {rank: (self.ranks[rank].returncode, *said[rank]) for rank in said}


def lines(output: str, level: str) -> list[str]:
    """The judgements of a level, with one space between columns."""
    return [re.sub(r" +", " ", line) for line in output.splitlines() if line.startswith(level)]


def test_processes_that_are_well_say_so_with_numbers(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)
    flags = ("--data", str(ROOT / "README.md"), "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "found.json"))
    job.start(range(3), *flags)
    ended = job.end()
    # Other work on this machine may slow one of them, which is none of the errors looked for here.
    wrong = [line for line in lines(ended[0][1], "error") if not line.startswith(("error matrix", "error links"))]
    assert wrong == [], ended
    assert "3 processes, started by torchrun" in ended[0][1]
    assert "alike in 3 processes" in ended[0][1]
    assert [ended[rank] for rank in (1, 2)] == [(0, "", "")] * 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["well"] == (ended[0][0] == 0)
    assert {one["subject"] for one in found["judgements"]} == {
        "versions", "devices", "processors", "environment", "data", "room", "--out", "matrix products", "clocks",
        "links", "all-reduce", "all-gather",
    }  # fmt: skip
    assert sorted(tuple(pair["ranks"]) for pair in found["found"]["pairs"]) == [(0, 1), (0, 2), (1, 2)]
    assert all(pair["bandwidth"] > 0 for pair in found["found"]["pairs"])
    assert all(clock["offset"] < 1 for clock in found["found"]["clocks"].values())
    assert list(tmp_path.glob(".lit-vlm*")) == []


@pytest.mark.slow
def test_the_slowed_one_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path, 4)
    job.start([0, 1, 3])
    job.start([2], before=("-m", "tests.machines.slowed", "0.1"))
    code, said, errors = job.end()[0]
    # How slow it is, and whether others are called slow, too, depends on other work on this machine.
    slow = [line for level in ("error", "warning") for line in lines(said, level) if "matrix products" in line]
    assert slow, said + errors
    assert "of n3 (rank 2) multiplies matrices" in slow[0]  # the slowest comes first
    assert code == bool(lines(said, "error"))


def test_another_version_of_the_kit_is_named_with_its_files(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "lit_vlm", other / "lit_vlm", ignore=shutil.ignore_patterns("__pycache__"))
    start = other / "lit_vlm" / "__init__.py"
    start.write_text(start.read_text().replace(f'"{lit_vlm.__version__}"', '"0.0.9"'))
    job = Job(tmp_path, 3)
    job.start([0, 2])
    job.start([1], before=("-P", "-m", "lit_vlm"), python=sys.executable, variables={"PYTHONPATH": f"{other}:{ROOT}"})
    code, said, errors = job.end()[0]
    assert code == 1
    assert lines(said, "error")[:2] == [
        f"error versions lit-vlm: 0.0.9 on n2 (rank 1), {lit_vlm.__version__} on n1 (rank 0), n3 (rank 2)",
        "error versions the code of n2 (rank 1) differs from the others' in lit_vlm/__init__.py",
    ], said + errors


@pytest.mark.slow
def test_one_that_never_comes_is_named_and_the_others_end(tmp_path: Path) -> None:
    job = Job(tmp_path, 3)
    job.start([0, 2], "--timeout", "15")
    ended = job.end()
    assert ended[0][0] == 1
    assert lines(ended[0][1], "error") == [
        "error processes rank 1 of 3 processes did not come within 15 s; there are n1 (rank 0), n3 (rank 2)"
    ], ended
    assert ended[2][0] == 0


@pytest.mark.slow
def test_without_the_first_the_others_end_and_say_why(tmp_path: Path) -> None:
    job = Job(tmp_path, 2)
    job.start([1], "--timeout", "3")
    code, _, errors = job.end()[1]
    assert code == 1
    assert f"rank 0 does not answer at 127.0.0.1:{job.port} within 3 s" in errors


@pytest.mark.slow
@pytest.mark.parametrize("killed", [True, False])
def test_one_that_dies_or_hangs_in_the_middle_is_named(tmp_path: Path, killed: bool) -> None:
    job = Job(tmp_path, 3)
    for rank in (0, 2):
        (tmp_path / str(rank) / "data").touch()
    os.mkfifo(tmp_path / "1" / "data")  # a file system that does not answer: the read waits for ever
    job.start(range(3), "--data", "data", "--timeout", "15")
    if killed:
        assert job.ranks[0].stdout is not None
        while not (line := job.ranks[0].stdout.readline()).startswith(("well", "warning", "error")):
            assert line, job.end()
        time.sleep(0.5)
        job.ranks[1].send_signal(signal.SIGKILL)
    code, said, errors = job.end()[0] if killed else (job.ranks[0].wait(timeout=120), *job.ranks[0].communicate())
    if not killed:
        job.ranks[1].kill()
        job.end()
    assert code == 1
    assert "error processes n2 (rank 1) stopped answering at the check of data and disks" in lines(said, "error"), (
        errors
    )
    assert "all-reduce of 1 pair of nodes" in said  # the others are measured
    assert "all-gather" not in said


def test_alone_it_checks_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path))
    main(["doctor", "--nodes", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("one process, so that nothing is compared: srun or torchrun starts it")
    assert "matrix products" in said
    assert "a job can start: 0 errors" in said
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--nodes", "--data", str(tmp_path / "absent")])
    assert ended.value.code == 1
    assert "do not start the job: 1 error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x", "--size", "1GiB"], "--data, --size is for the machines of a job: add --nodes"),
        (["--nodes", "--size", "64MB"], "--size is a whole number with a unit, such as 64MiB or 1GiB"),
        (["--nodes", "--size", "0MiB"], "not 0MiB"),
        (["--nodes", "--timeout", "0"], "--timeout is a number of seconds above 0, not 0"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", *words])
    assert message in capsys.readouterr().err
