"""The tables of docs/decoders.md are what their comparisons give."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.decoders import wrappers
from tests.decoders.families import CHECKS, FAMILIES, YES, all_sharded, row
from tests.tiny import ROOT

QUICK = ("qwen3", "qwen3_next")
QUICK_CHECKPOINTS = ("gemma3", "mllama", "qwen3_vl")


def table_of(page: str) -> dict[str, list[str]]:
    """The rows of a table, by the name in their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    return {cells[0].strip("`"): cells[1:] for cells in rows}


FIRST, SECOND = (ROOT / "docs" / "decoders.md").read_text(encoding="utf-8").split("| checkpoint |")
TABLE, CHECKPOINTS = table_of(FIRST), table_of(SECOND)


def test_the_page_has_a_row_for_each_family() -> None:
    assert sorted(TABLE) == sorted(FAMILIES)
    assert {len(cells) for cells in TABLE.values()} == {len(CHECKS) + 1}
    assert sorted(CHECKPOINTS) == sorted(wrappers.MULTIMODAL)


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_each_cell_is_as_the_page_says(family: str) -> None:
    assert row(family) == TABLE[family][:-1]


@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK_CHECKPOINTS else pytest.param(family, marks=pytest.mark.slow)
        for family in wrappers.MULTIMODAL
    ],
)
def test_each_checkpoint_loads_as_the_page_says(family: str) -> None:
    assert wrappers.row(family) == CHECKPOINTS[family]


@pytest.mark.slow
def test_two_sharded_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    assert all_sharded(tmp_path) == {family for family, cells in TABLE.items() if cells[-1] == YES}
