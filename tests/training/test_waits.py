from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_vlm.core.losses import contrastive_loss
from lit_vlm.training import waits
from lit_vlm.training.waits import MEANT, SIGN, Waits


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device nothing waits: the tests warn in PyTorch's place."""
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)


def test_a_warning_of_a_wait_is_counted_by_its_place_and_others_are_shown(recwarn: pytest.WarningsRecorder) -> None:
    before = warnings.showwarning
    with Waits() as found:
        for _ in range(2):
            warnings.warn(f"called a {SIGN}", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(found.found.values()) == [2]
    assert next(iter(found.found)).endswith("test_a_warning_of_a_wait_is_counted_by_its_place_and_others_are_shown")
    assert [str(warning.message) for warning in recwarn] == ["something else"]
    assert warnings.showwarning is before


def test_a_place_names_the_kit_and_what_it_called(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Waits()

    def warn(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        warnings.warn(f"called a {SIGN}", stacklevel=1)
        return tensor

    monkeypatch.setattr(F, "normalize", warn)
    with found:
        contrastive_loss(torch.ones(1, 2, 1, 3), torch.ones(2, 1, 3), torch.zeros(1))
    assert all(place.startswith("lit_vlm/core/losses.py contrastive_loss < ") for place in found.found)
    assert sum(found.found.values()) == 2


def test_meant_waits_are_places_that_exist_each_with_its_reason() -> None:
    found = Waits()
    found.found = Counter({f"{place} < torch/x.py y": 1 for place in MEANT} | {"lit_vlm/model/vlm.py see": 3})
    assert found.unwanted() == {"lit_vlm/model/vlm.py see": 3}
    for place, reason in MEANT.items():
        file, _, function = place.partition(" ")
        library = Path(torch.__file__).parents[1]
        [at] = [root / file for root in (waits.ROOT, library) if (root / file).exists()]
        assert not function or f"def {function}(" in at.read_text(encoding="utf-8")
        assert reason
