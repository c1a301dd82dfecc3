"""The table of docs/decoders.md is what its comparisons give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.decoders.families import CHECKS, FAMILIES, YES, all_sharded, row
from tests.tiny import ROOT

QUICK = ("qwen3", "qwen3_next")
TABLE = {
    cells[0].strip("`"): cells[1:]
    for line in (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `") and (cells := [cell.strip() for cell in line.strip("|").split("|")])
}


def test_the_page_has_a_row_for_each_family() -> None:
    assert sorted(TABLE) == sorted(FAMILIES)
    assert {len(cells) for cells in TABLE.values()} == {len(CHECKS) + 1}


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_each_cell_is_as_the_page_says(family: str) -> None:
    assert row(family) == TABLE[family][:-1]


@pytest.mark.slow
def test_two_sharded_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    assert all_sharded(tmp_path) == {family for family, cells in TABLE.items() if cells[-1] == YES}
