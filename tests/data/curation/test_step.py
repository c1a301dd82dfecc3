"""Identities: the same for the same settings, another for others, and the same before and after use."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_vlm.data.curation import Score, Size
from lit_vlm.data.curation.step import identity
from tests.data.curation.planted import CAPTION, Brightness, captions, encoded


class Lazy(Brightness):
    """Learns something when it is used."""

    @cached_property
    def width(self) -> int:
        return 7


def test_settings_make_the_identity() -> None:
    assert identity(Size(min_side=3)) == identity(Size(min_side=3))
    assert identity(Size(min_side=3)) != identity(Size(min_side=4))
    assert Score(Brightness(1.0), max_score=1).key != Score(Brightness(2.0), max_score=1).key
    assert Score(Brightness(1.0), max_score=1).key != Score(Lazy(1.0), max_score=1).key


def test_what_is_learned_in_use_is_no_setting() -> None:
    lazy = Lazy()
    before = identity(lazy)
    lazy._model, _ = object(), lazy.width  # type: ignore[attr-defined]
    assert "width" in vars(lazy)
    assert identity(lazy) == before


@pytest.mark.parametrize("value", [np.zeros(2), torch.zeros(2)])
def test_numbers_that_cannot_be_written_down_are_refused(value: object) -> None:
    step = Size(min_side=3)
    step.weights = value  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="is no setting that can be written down: begin the attribute's name with _"):
        identity(step)


def test_sources_are_known_by_path_and_content(tmp_path: Path) -> None:
    one = captions(tmp_path, [(encoded(), CAPTION)])
    before = identity(one)
    assert before == identity(captions(tmp_path, [(encoded(), CAPTION)]))
    assert before != identity(captions(tmp_path, [(encoded(), CAPTION + ".")]))
