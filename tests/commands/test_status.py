"""`lit-vlm status`: what it tells of runs in every state."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lit_vlm.checkpoints.progress import Progress
from lit_vlm.cluster.queue import InQueue, Submitted
from lit_vlm.cluster.status import length, tell
from lit_vlm.commands.runs import RunState
from lit_vlm.commands.status import main, read_run
from tests.tiny import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def progress(**changes: Any) -> Progress:
    settings = {
        "step": 300, "steps": 500, "first_step": 100, "tokens_per_s": 51234.5, "time": ago(3), "started": ago(403),
        "host": socket.gethostname(), "pid": os.getpid(), "slurm_job": None, "state": "training",
    }  # fmt: skip
    return Progress(**(settings | changes))


def run(
    name: str = "runs/a", written: Progress | None = None, done: tuple[str, ...] = (), job: str | None = None
) -> Path:
    """The folder of a run of two stages, of which the second trains."""
    folder = Path(name)
    RunState("llava15", "tiny", "ddp", ["1_align", "2_sft"], [], list(done)).save(folder)
    if written is not None:
        written.write(folder / "2_sft")
    if job is not None:
        Submitted(job, ("1_align", "2_sft")).save(folder)
    return folder


def checkpoint(folder: Path, step: int, age: float) -> None:
    file = folder / "2_sft" / "checkpoints" / f"step={step:08d}.ckpt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("weights", "")
    os.utime(file, (time.time() - age,) * 2)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    main([*words, "--json"])
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(written=progress(), done=("1_align",))
    checkpoint(folder, 250, 130)
    (one,) = told(capsys)
    assert one["eta"] == pytest.approx(400, abs=3)  # 200 steps in 400 s, 200 to go
    age = one.pop("checkpoint_age")
    assert age == pytest.approx(130, abs=5)
    assert one == {
        "run": "runs/a", "stage": "2_sft", "state": "training", "step": 300, "steps": 500, "tokens_per_s": 51234.5,
        "eta": one["eta"], "job": None, "queue": None, "checkpoint_step": 250, "requeues": 0, "error": None,
        "checkpoint": "runs/a/2_sft/checkpoints/step=00000250.ckpt",
    }  # fmt: skip
    main([])
    shown = " ".join(capsys.readouterr().out.split())
    assert "runs/a 2_sft training 300 of 500 51,234 6 min 40 s 250, 2 min" in shown


def test_a_process_that_is_gone_and_one_that_is_silent_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    run("runs/gone", progress(pid=dead.pid), ("1_align",))
    run("runs/silent", progress(host="elsewhere", time=ago(400)), ("1_align",))
    run("runs/saving", progress(host="elsewhere", time=ago(400), state="saving"), ("1_align",))
    run("runs/ended", progress(pid=dead.pid, state="preempted"), ("1_align",))
    found = {one["run"]: (one["state"], one["error"]) for one in told(capsys)}
    assert found["runs/gone"][0] == "lost"
    assert f": process {dead.pid} is gone" in found["runs/gone"][1]
    assert found["runs/silent"][0] == "lost"
    assert found["runs/silent"][1].startswith("no sign of life since 20")
    assert found["runs/silent"][1].endswith(": elsewhere wrote nothing for 6 min 40 s")
    assert found["runs/saving"] == ("saving", None)
    assert found["runs/ended"] == ("preempted", None)


def test_what_ended_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    run("runs/failed", progress(state="failed", error="RuntimeError: no more"), ("1_align",))
    run("runs/new")
    run("runs/finished", progress(state="finished", step=500), ("1_align", "2_sft"))
    marked = run("runs/marked", progress(state="finished", step=500), ())
    for stage in ("1_align", "2_sft"):
        (marked / stage).mkdir(exist_ok=True)
        (marked / stage / "done.json").touch()
    killed = run("runs/killed", None, ("1_align",))
    (killed / "attempts.tsv").write_text(
        "2030-01-01T00:00:00+00:00\t7\tstart\t\t\n2030-01-01T00:00:09+00:00\t7\t137\t\ton\t\n"
    )
    found = {one["run"].removeprefix("runs/"): (one["state"], one["stage"], one["error"]) for one in told(capsys)}
    assert found == {
        "failed": ("failed", "2_sft", "RuntimeError: no more"),
        "new": ("unknown", "1_align", None),
        "finished": ("finished", "2_sft", None),
        "marked": ("finished", "2_sft", None),
        "killed": ("unknown", "2_sft", "the job ended with exit code 137"),
    }
    main(["runs/failed"])
    assert "runs/failed: RuntimeError: no more" in capsys.readouterr().out


def test_the_queue_is_asked_once_for_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "bin").mkdir()
    (here / "bin" / "squeue").write_text(
        "#!/bin/sh\necho asked >>asked\necho '7|7_N/A|PENDING|Priority'\necho '9|8_1|RUNNING|None'\n"
    )
    (here / "bin" / "squeue").chmod(0o755)
    run("runs/a", progress(slurm_job="7", state="preempted"), ("1_align",), job="7")
    run("runs/b", progress(slurm_job="9", host="n1"), ("1_align",))
    Submitted("8", ("1_align",), (1, 2)).save(Path("runs/c"))
    Submitted("8_1", ("1_align",)).save(Path("runs/c/seed-1"))
    Submitted("8_2", ("1_align",)).save(Path("runs/c/seed-2"))
    found = {one["run"]: (one["state"], one["job"], one["queue"]) for one in told(capsys)}
    assert found == {
        "runs/a": ("waiting", "7", "pending (Priority)"),
        "runs/b": ("training", "9", "running"),
        "runs/c/seed-1": ("starting", "8_1", "running"),
        "runs/c/seed-2": ("unknown", "8_2", None),
    }
    assert (here / "asked").read_text() == "asked\n"


def test_a_job_that_began_again_is_starting_until_it_writes(here: Path) -> None:
    folder = run("runs/a", progress(slurm_job="7", state="preempted", time=ago(60)), ("1_align",), job="7")
    lines = [(ago(600), "start"), (ago(60), "75"), (ago(30), "start")]
    (folder / "attempts.tsv").write_text("".join(f"{at}\t7\t{what}\t\t\n" for at, what in lines))
    one = tell(read_run(folder), InQueue("RUNNING"))
    assert (one.state, one.requeues) == ("starting", 1)
    progress(slurm_job="7", time=ago(5), host="n1").write(folder / "2_sft")
    assert tell(read_run(folder), InQueue("RUNNING")).state == "training"


def test_a_stage_that_is_no_part_of_a_run_is_told_by_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    progress(steps=None).write(Path("runs/align-1"))
    (one,) = told(capsys, "runs/align-1")
    assert (one["stage"], one["state"], one["steps"], one["eta"]) == ("align-1", "training", None, None)


def test_missing_folders_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no folder runs here: name the folders of runs"):
        main([])
    with pytest.raises(ValueError, match="there is no folder elsewhere: name the folder of a run"):
        main(["elsewhere"])
    Path("runs/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="runs holds no run: it has no run.json, job.json or progress.json"):
        main([])


def test_it_answers_without_pytorch(here: Path) -> None:
    checkpoint(run(written=progress(), done=("1_align",)), 250, 130)
    code = (
        "import sys\nfrom lit_vlm.commands.cli import main\nmain(['status'])\n"
        "sys.stderr.write(str({'torch', 'lightning', 'mlflow', 'pydantic'} & sys.modules.keys()))"
    )
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=variables)
    assert done.stderr == "set()"
    assert "300 of 500" in done.stdout


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.6, "1 min"), (3599, "59 min 59 s"), (7200, "2 h"), (7260, "2 h 1 min"), (86460, "1 d"),
     (190800, "2 d 5 h")],
)  # fmt: skip
def test_lengths_of_time_have_two_units(seconds: float, words: str) -> None:
    assert length(seconds) == words


def test_runs_of_an_ablation_are_found_in_its_folder_and_above(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"runs/pal/runs/{variant}/seed-{seed}" for variant in ("base", "no-pal") for seed in (0, 10)]
    for name in reversed(names):
        run(name, written=progress())
    assert [one["run"] for one in told(capsys, "runs/pal")] == names
    assert [one["run"] for one in told(capsys)] == names
