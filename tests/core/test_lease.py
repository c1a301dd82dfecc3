"""However the holder of a lease ends, on whatever file system, somebody else has it in the end; never two at once."""

from __future__ import annotations

import errno
import os
import random
import time
from multiprocessing import get_context
from pathlib import Path

import filelock._soft
import pytest

from lit_vlm.core import lease as lease_module
from lit_vlm.core.lease import Lease

PATIENCE = 0.5


def soon(lease: Lease) -> float:
    """Seconds until it could be taken."""
    begin = time.monotonic()
    while not lease.take():
        assert time.monotonic() - begin < 60
        time.sleep(0.02)
    return time.monotonic() - begin


def _hold(path: Path, ready: Path) -> None:
    lease = Lease(path, PATIENCE)
    assert lease.take()
    ready.touch()
    time.sleep(600)


def _take_again_and_again(path: Path) -> None:
    lease = Lease(path, PATIENCE)
    while True:
        assert lease.take()
        lease.release()


def test_it_is_held_by_one_and_free_again(tmp_path: Path) -> None:
    mine, other = (Lease(tmp_path / "lease", PATIENCE) for _ in range(2))
    assert mine.take()
    end = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < end:  # its holder touches it
        assert not other.take()
        time.sleep(0.05)
    assert not mine.is_lost
    mine.release()
    assert other.take()
    other.release()
    assert not list(tmp_path.iterdir())


def test_a_holder_that_was_killed_before_it_wrote_its_name_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "lease").touch()
    lease = Lease(tmp_path / "lease", PATIENCE)
    assert soon(lease) > PATIENCE
    assert not lease.is_lost
    lease.release()
    assert not list(tmp_path.iterdir())


def test_a_dead_holder_is_found_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock._soft, "exchange_names", lambda *_: False)  # NFS answers so
    holder = get_context("fork").Process(target=_hold, args=(tmp_path / "lease", tmp_path / "ready"), daemon=True)
    holder.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    lease = Lease(tmp_path / "lease", PATIENCE)
    end = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < end:
        assert not lease.take()
        time.sleep(0.05)
    holder.kill()
    holder.join()
    assert soon(lease) < 10
    lease.release()
    assert [file.name for file in tmp_path.iterdir()] == ["ready"]


def test_the_file_of_somebody_who_was_faster_comes_back(tmp_path: Path) -> None:
    (tmp_path / "lease").touch()
    late, fast = (Lease(tmp_path / "lease", PATIENCE) for _ in range(2))
    marker = late._untouched() or late._seen[0]
    assert marker is not None
    soon(fast)
    late._remove(marker)
    assert not late.take()
    time.sleep(PATIENCE)  # time for a look of the thread that touches it
    assert not fast.is_lost
    fast.release()
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_at_any_moment_holds_nobody_up(tmp_path: Path) -> None:
    chance = random.Random(0)
    lease = Lease(tmp_path / "lease", PATIENCE)
    for _ in range(20):
        process = get_context("fork").Process(target=_take_again_and_again, args=(tmp_path / "lease",), daemon=True)
        process.start()
        time.sleep(0.02 + chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert soon(lease) < 10
        lease.release()


def test_a_file_of_somebody_else_comes_back_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("links to files of others are not allowed")

    (tmp_path / "lease").touch()
    late, fast = (Lease(tmp_path / "lease", PATIENCE) for _ in range(2))
    assert not late.take()
    marker = late._seen[0]
    assert marker is not None
    soon(fast)
    monkeypatch.setattr(os, "link", refused)
    late._remove(marker)
    assert not late.take()
    time.sleep(PATIENCE)
    assert not fast.is_lost
    fast.release()
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_looked_at_is_somebody_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    (tmp_path / "lease").touch()
    lease = Lease(tmp_path / "lease", PATIENCE)
    monkeypatch.setattr(lease_module, "_identity", stale)
    assert not lease.take()
