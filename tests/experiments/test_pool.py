"""Tasks side by side: what needs what, slots, failures, signals. The commands are words of a small `lit_vlm`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lit_vlm.core import children
from lit_vlm.experiments.pool import Pool, Slots, State, Task, last_words
from tests.tiny import ROOT


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `lit_vlm` that runs the Python code that is its first word, so that nothing large is imported."""
    package = tmp_path / "path" / "lit_vlm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    dies = f"runpy.run_path({children.__file__!r})['die_with_parent']()"
    (package / "__main__.py").write_text(f"import runpy, sys\n{dies}\nexec(sys.argv[1])\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return tmp_path


def task(folder: Path, name: str, code: str = "", needs: Sequence[str] = (), devices: int = 1) -> Task:
    mark = folder / f"{name}.done"
    write = f"import os, sys, time, signal, pathlib\n{code}\npathlib.Path({str(mark)!r}).write_text(str(time.time()))"
    return Task(name, lambda: [write], folder / f"{name}.log", mark.is_file, tuple(needs), devices)


def ran(tasks: Sequence[Task], slots: Slots = Slots((), 2), show: Callable[[], None] = lambda: None) -> Pool:  # noqa: B008
    with Pool(slots, show) as pool:
        pool.run(tasks)
    return pool


def test_a_task_starts_when_what_it_needs_is_done(program: Path) -> None:
    beside = f"end = time.time() + 30\nwhile not os.path.exists({str(program / 'c.done')!r}): assert time.time() < end"
    tasks = [task(program, "a", beside), task(program, "b", needs=["a"]), task(program, "c")]
    assert set(ran(tasks).states.values()) == {State.DONE}
    when = {name: float((program / f"{name}.done").read_text()) for name in "abc"}
    assert max(when, key=lambda name: when[name]) == "b"
    stamp = (program / "a.done").stat().st_mtime_ns
    assert set(ran(tasks).states.values()) == {State.DONE}  # the same tasks again: nothing is done twice
    assert (program / "a.done").stat().st_mtime_ns == stamp


def test_a_failure_stops_what_needs_it_alone(program: Path) -> None:
    tasks = [
        task(program, "a", "sys.exit('error: no such thing')"),
        task(program, "b", needs=["a"]),
        task(program, "c", needs=["b"]),
        task(program, "d"),
    ]
    pool = ran(tasks)
    assert pool.states == {"a": State.FAILED, "b": State.LEFT_OUT, "c": State.LEFT_OUT, "d": State.DONE}
    assert pool.codes == {"a": 1}
    assert last_words(program / "a.log") == "error: no such thing"
    (program / "a.log").unlink()
    tasks[0] = task(program, "a")
    assert set(ran(tasks).states.values()) == {State.DONE}
    assert last_words(program / "none") == ""


def test_a_command_that_ends_without_its_mark_has_failed(program: Path) -> None:
    assert ran([task(program, "a", "sys.exit(0)")]).states == {"a": State.FAILED}
    marked = Task("m", lambda: ["pass"], program / "m.log", (program / "m").is_file, mark=(program / "m").touch)
    assert ran([marked]).states == {"m": State.DONE}


def test_the_end_of_a_task_s_time_is_that_of_all(program: Path) -> None:
    save = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open('%s', 'w').close(); time.sleep(60)"
    ready = program / "ready"
    first = f"end = time.time() + 30\nwhile not os.path.exists({str(ready)!r}): assert time.time() < end\nsys.exit(75)"
    tasks = [task(program, "a", first), task(program, "b", save % ready), task(program, "c")]
    pool = ran(tasks)
    assert pool.states == {"a": State.LEFT, "b": State.LEFT, "c": State.WAITING}
    assert pool.asked == "the end of its time"


def test_a_task_that_cannot_start_fails_alone(program: Path) -> None:
    def words() -> list[str]:
        raise ValueError("the recipe is gone")

    bad = Task("bad", words, program / "bad.log", lambda: False)
    assert ran([bad, task(program, "a")]).states == {"bad": State.FAILED, "a": State.DONE}
    assert last_words(bad.log) == "error: the recipe is gone"
    assert ran([bad]).states == {"bad": State.FAILED}  # and it can be tried again


def test_slots_are_shared_out(program: Path) -> None:
    said = "print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(0.4)"
    tasks = [task(program, name, said, devices=n) for name, n in (("a", 1), ("b", 2), ("c", 1), ("d", 1))]
    running: list[int] = []
    with Pool(Slots(("4", "5"), 1), lambda: running.append(len(pool._running))) as pool:
        pool.run(tasks)
    assert [(program / f"{name}.log").read_text().strip() for name in "ab"] == ["4", "4,5"]
    assert {(program / f"{name}.log").read_text().strip() for name in "cd"} == {"4", "5"}
    assert max(running) == 2
    with pytest.raises(ValueError, match="e trains on 3 devices, and there are 2: lower trainer.devices"):
        ran([task(program, "e", devices=3)])


def test_cores_are_shared_out(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    ran([task(program, "a", "print(os.environ['OMP_NUM_THREADS'])")], Slots((), 2))
    assert (program / "a.log").read_text().strip() == "3"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_lets_tasks_save_and_leave(program: Path, number: signal.Signals) -> None:
    leave = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(60)"
    tasks = [task(program, "a", leave), task(program, "b")]

    def send() -> None:
        while not (program / "a.log").exists() or "ready" not in (program / "a.log").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    outer = signal.signal(number, signal.SIG_DFL)  # a shell lets processes in its background ignore SIGINT
    try:
        thread = threading.Thread(target=send)
        thread.start()
        pool = ran(tasks, Slots((), 1))
        thread.join()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, outer)
    assert pool.asked == number.name
    assert pool.states == {"a": State.LEFT, "b": State.WAITING}


def test_pools_share_tasks(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_vlm.experiments.pool.LOOK", 0.1)
    line = f"open({str(program / 'order')!r}, 'a').write('%s')"
    tasks = [task(program, name, f"time.sleep(0.3); {line % name}") for name in "abc"]
    tasks += [task(program, "d", line % "d", needs=["a", "b", "c"]), task(program, "e", "sys.exit(3)", needs=["d"])]
    other = Pool(Slots((), 1), lambda: None)  # signals are for the main thread
    thread = threading.Thread(target=other.run, args=(tasks,))
    thread.start()
    pool = ran(tasks, Slots((), 1))
    thread.join()
    assert pool.states == other.states == {**dict.fromkeys("abcd", State.DONE), "e": State.FAILED}
    assert pool.codes == other.codes == {"e": 3}
    done = (program / "order").read_text()
    assert sorted(done) == ["a", "b", "c", "d"]
    assert done[-1] == "d"


def test_tasks_die_with_the_pool(program: Path) -> None:
    code = (
        "import os; from pathlib import Path; from lit_vlm.experiments.pool import Pool, Slots, Task\n"
        f"os.environ['PYTHONPATH'] = {str(program / 'path')!r}\n"
        "words = ['import os, time; print(os.getpid(), flush=True); time.sleep(60)']\n"
        f"task = Task('a', lambda: words, Path({str(program / 'a.log')!r}), lambda: False)\n"
        "with Pool(Slots((), 1), lambda: None) as pool: pool.run([task])"
    )
    variables = os.environ | {"PYTHONPATH": f"{ROOT}"}
    with subprocess.Popen([sys.executable, "-c", code], env=variables) as pool:
        log = program / "a.log"
        while not (log.exists() and log.read_text().strip()):
            assert pool.poll() is None
            time.sleep(0.02)
        pool.kill()
    assert log.read_text().strip().isdigit()
    end = time.monotonic() + 10
    while Path(f"/proc/{log.read_text().strip()}").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
