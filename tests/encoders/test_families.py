"""The table of docs/encoders.md is what its comparisons give."""

from __future__ import annotations

import pytest

from lit_vlm import encoders
from lit_vlm.encoders import Encoder
from tests.encoders.families import CHECKS, FAMILIES, SAVED, YES, row, sharded
from tests.tiny import ROOT

QUICK = ("CLIP", "Qwen2.5-VL", "DINOv3 ConvNeXt")
OF_OLA_VLM = {"CLIPEmbedding", "DepthAnything", "OneFormerSwin"}
"""Networks that OLA-VLM distils from; `test_teachers.py` compares them with their models of transformers."""
TABLE = {
    cells[0]: cells[1:]
    for line in (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) > 2
    if cells[0] != "family"
}


def test_the_page_has_a_row_for_each_family_and_a_family_for_each_class() -> None:
    assert list(TABLE) == list(FAMILIES)
    assert {len(cells) for cells in TABLE.values()} == {len(CHECKS) + 2}
    classes = {factory.func.__name__ for factory in FAMILIES.values()}  # type: ignore[attr-defined]
    assert {cells[0] for cells in TABLE.values()} == {f"`{name}`" for name in classes}
    members = {name for name in encoders.__all__ if issubclass(getattr(encoders, name), Encoder)}
    assert classes | OF_OLA_VLM | {"Encoder"} == members
    assert SAVED.keys() <= FAMILIES.keys()


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_each_cell_is_as_the_page_says(family: str) -> None:
    assert row(family) == TABLE[family][1:-1]


@pytest.mark.slow
def test_two_sharded_processes_train_as_one() -> None:
    assert sharded() == {family for family, cells in TABLE.items() if cells[-1] == YES}
