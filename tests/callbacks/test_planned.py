"""What was planned, beside what is met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from callbacks import Planned
from lit_vlm.checkpoints.folder import PLAN_FILE
from lit_vlm.commands.lightning_cli import DEFAULT_CALLBACKS
from tests.callbacks.test_callbacks import data, lit, trainer

PLAN = {"memory_gib": {"peak": 20.5, "reserved": 27.25}, "seconds": {"step": 5.5}}


def test_the_plan_of_a_run_is_logged_and_printed_beside_what_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PLAN_FILE).write_text(json.dumps(PLAN))
    run = trainer(tmp_path, Planned())
    run.fit(lit(), data())
    logged = run.callback_metrics
    assert [float(logged[f"planned/{name}"]) for name in ("allocated", "reserved", "step_seconds")] == [
        20.5,
        27.25,
        5.5,
    ]
    assert 0 < float(logged["throughput/step_seconds"]) < 60
    assert "5.50 s per step planned, " in capsys.readouterr().out


def test_without_a_plan_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, Planned())
    run.fit(lit(), data())
    assert "planned/allocated" not in run.callback_metrics
    assert "planned" not in capsys.readouterr().out


def test_the_peak_is_read_before_it_counts_anew() -> None:
    assert DEFAULT_CALLBACKS.index("callbacks.Planned") < DEFAULT_CALLBACKS.index("callbacks.Memory")
