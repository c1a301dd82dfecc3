"""How batches get to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_vlm.core.batch import Batch
from lit_vlm.data import ChatML, SquareCrop, VLMData
from lit_vlm.data import datamodule as module
from lit_vlm.worlds import Shapes


@pytest.mark.parametrize("waits", [True, False])
def test_a_batch_is_moved_without_waiting_where_its_memory_is_pinned(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Batch, "to", lambda self, *args, **kwargs: asked.append((args, kwargs)) or self)
    if not waits:
        monkeypatch.setattr(module, "PINNED", ("meta",))
    data = VLMData([Shapes(4)], ChatML(), SquareCrop())
    batch = object.__new__(Batch)
    assert data.transfer_batch_to_device(batch, torch.device("meta"), 0) is batch
    assert asked == [((torch.device("meta"),), {"non_blocking": not waits})]
