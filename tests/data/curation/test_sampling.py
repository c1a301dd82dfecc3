"""Drawing by source: exact counts, the same records whatever their order, larger samples that contain smaller ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_vlm.data.curation import Sample
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.sampling import shared_out
from lit_vlm.data.records import Record
from tests.data.made import Count


class Backwards(Count):
    """The same records, last first."""

    def record(self, index: int) -> Record:
        return super().record(self.count - 1 - index)


def drawn(step: Sample, folder: Path, *sources: Count, seed: int = 0) -> set[str]:
    table = measured(sources, step.measures(), folder)
    verdict = step.decide(table, table.readable, np.random.default_rng(seed), None)
    return set(table.ids(table.readable[verdict.codes == 0]))


def counts(names: set[str]) -> dict[str, int]:
    return {letter: sum(name.startswith(letter) for name in names) for letter in "abc"}


def test_quotas_are_upper_limits_and_other_sources_stay(tmp_path: Path) -> None:
    sources = Count("a", 50), Count("b", 30), Count("c", 20)
    assert counts(drawn(Sample(quotas={"a": 7, "b": 99}), tmp_path, *sources)) == {"a": 7, "b": 30, "c": 20}
    assert counts(drawn(Sample(quotas={"a": 0}), tmp_path, *sources)) == {"a": 0, "b": 30, "c": 20}


def test_weights_share_out_a_total_exactly(tmp_path: Path) -> None:
    sources = Count("a", 50), Count("b", 30), Count("c", 20)
    found = drawn(Sample(total=20, weights={"a": 1, "b": 1, "c": 1}), tmp_path, *sources)
    assert counts(found) == {"a": 7, "b": 7, "c": 6}
    assert counts(drawn(Sample(total=50), tmp_path, *sources)) == {"a": 25, "b": 15, "c": 10}
    for total in range(40):
        assert sum(shared_out(total, [0.3, 2.5, 1e-9, 7])) == total


def test_the_same_are_drawn_in_any_order_and_more_contain_fewer(tmp_path: Path) -> None:
    few = drawn(Sample(total=20), tmp_path / "few", Count("a", 200))
    more = drawn(Sample(total=60), tmp_path / "more", Count("a", 200))
    assert few < more
    assert few == drawn(Sample(total=20), tmp_path / "back", Backwards("a", 200))
    other = drawn(Sample(total=20), tmp_path / "few", Count("a", 200), seed=1)
    assert len(other) == 20
    assert other != few
    places = sorted(int(name.split("-")[1]) for name in more)
    assert places != list(range(60))
    assert 70 < np.mean(places) < 130  # spread over the source


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "set either quotas or total"),
        ({"quotas": {"a": 1}, "total": 2}, "set either quotas or total"),
        ({"quotas": {"a": 1}, "weights": {"a": 1.0}}, "weights share out a total"),
        ({"quotas": {"a": -1}}, "not negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Sample(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quotas": {"laion": 1}}, "names the sources laion; there are a, b"),
        ({"total": 4, "weights": {"a": 1.0}}, "no weight for b; 0 leaves a source out"),
        ({"total": 40, "weights": {"a": 1.0, "b": 1.0}}, "wants 20 records of b, and 10 came to it"),
    ],
)
def test_sources_that_do_not_fit_are_named(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        drawn(Sample(**settings), tmp_path, Count("a", 30), Count("b", 10))
