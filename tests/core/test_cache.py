"""What several processes make in one cache folder is made once, and is whole."""

from __future__ import annotations

import os
import socket
import time
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest

from lit_vlm.core import cache
from lit_vlm.data.records import Record
from lit_vlm.data.sets.scan import id_value, scan
from lit_vlm.data.sources import Source
from tests.data.made import Count


def _hold(folder: Path, seconds: float, host: str = "") -> None:
    if host:
        socket.gethostname = lambda: host
    with cache.held(folder / "lock", "draws"), (folder / "log").open("a") as log:
        log.write(f"{os.getpid()} ")
        log.flush()
        time.sleep(seconds)
        log.write(f"{os.getpid()} ")


def _start(*arguments: object) -> ForkProcess:
    process = get_context("fork").Process(target=_hold, args=arguments)
    process.start()
    return process


def test_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "SILENT", 0.2)
    processes = [_start(tmp_path, 0.5) for _ in range(3)]
    for process in processes:
        process.join(60)
    log = (tmp_path / "log").read_text().split()
    assert log[::2] == log[1::2]
    assert len(set(log)) == 3
    assert "waiting for another process, which draws\n" in capfd.readouterr().err


@pytest.mark.parametrize(("host", "least"), [("", 0.0), ("elsewhere", 2.0)])
def test_the_lock_of_a_dead_process_is_taken_over(
    host: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 2.0)
    monkeypatch.setattr(cache, "SILENT", 0.1)
    gone = _start(tmp_path, 100, host)
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    gone.kill()
    gone.join()
    begin = time.monotonic()
    with cache.held(tmp_path / "lock", "draws"):
        assert time.monotonic() - begin >= least
    assert not (tmp_path / "lock").exists()


def _measure(record: Record, source: Source) -> tuple[int]:
    time.sleep(0.002)
    with Path(os.environ["LIT_VLM_CACHE"], "log").open("a") as log:
        log.write("x")
    return id_value(record, source)


def _scan(out: Path) -> None:
    np.save(out, scan(Count("n", 100), _measure, 1, "test"))


@pytest.mark.parametrize("shared", [True, False])
def test_a_scan_is_made_once_in_each_cache(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    for number in range(2):
        place = tmp_path / ("cache" if shared else f"cache{number}")
        place.mkdir(exist_ok=True)
        monkeypatch.setenv("LIT_VLM_CACHE", str(place))
        processes.append(get_context("fork").Process(target=_scan, args=(tmp_path / f"{number}.npy",)))
        processes[-1].start()
    for process in processes:
        process.join(60)
    found = [np.load(tmp_path / f"{number}.npy") for number in range(2)]
    assert (found[0] == found[1]).all()
    counts = [len(log.read_text()) for log in tmp_path.glob("cache*/log")]
    assert counts == ([100] if shared else [100, 100])
    assert not list(tmp_path.glob("cache*/scans/*.partial*"))


def test_a_lock_that_an_earlier_version_left_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path))
    source = Count("numbers", 3)
    first = scan(source, id_value, 1, "ids", ids=True)
    (file,) = (tmp_path / "scans").glob("*.npy")
    file.unlink()
    file.with_suffix(".lock").touch()
    monkeypatch.setattr(cache, "SILENT", 0.0)
    assert scan(source, id_value, 1, "ids", ids=True).tolist() == first.tolist()
