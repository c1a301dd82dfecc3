from __future__ import annotations

import time

import pytest

from lit_vlm.core import progress


@pytest.mark.parametrize(
    ("seconds", "done", "expected"),
    [
        (10, 100, "reading: 100 of 1,000, 10/s, 90 s left"),
        (10, 5, "reading: 5 of 1,000, 0.5/s, 33 min left"),
        (1000, 100, "reading: 100 of 1,000, 0.1/s, 2 h 30 min left"),
        (10, 1000, "reading: 1,000 of 1,000, 100/s"),
    ],
)
def test_a_line_says_how_fast_it_goes_and_how_long_it_takes(
    seconds: int, done: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with progress.progress("reading", 1000) as advance:
        clock[0] = seconds
        advance(done)
        clock[0] = progress.SECONDS - 1  # the last line is for work that took longer
    assert capsys.readouterr().out.splitlines() == ["reading: 0 of 1,000", expected]


def test_only_work_that_takes_long_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    for title, seconds, shown in (("short", 0.0, True), ("long", 0.4, True), ("of another process", 0.4, False)):
        with progress.slowly(title, shown):
            time.sleep(seconds)
    time.sleep(0.1)
    assert capsys.readouterr().err == "long ...\n"
