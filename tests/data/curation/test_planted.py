"""Faults that were planted in scenes are found by the steps that are for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.curation import THRESHOLD, found_by_step
from tests.benchmarks.planted import plant


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path: Path) -> None:
    found = found_by_step(plant(tmp_path / "data", 600), tmp_path / "measures")
    for name in ("Size(min_side=64)", "ExactDuplicates()"):
        assert found[name].precision == found[name].recall == 1
    similar = found[f"Similarity(threshold={THRESHOLD})"]
    assert similar.planted == 30
    assert similar.recall > 0.9
    assert similar.precision > 0.6
    exact = found["ExactDuplicates(against)"]
    assert exact.shares == {"benchmark": 1, "benchmark_encoded": 0}
    assert exact.precision == 1
    for name in ("PerceptualDuplicates(4, bits=64)", "PerceptualDuplicates(16, bits=256)"):
        assert found[name].precision > 0.95
        assert min(share for fault, share in found[name].shares.items() if fault != "cropped") > 0.9
    assert found["PerceptualDuplicates(32, 256, against)"].recall == 1
