from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_vlm.core import transfer
from lit_vlm.core.transfer import Fetched, send, send_numbers


def test_on_the_host_a_tensor_stays_where_it_is() -> None:
    tensor = torch.arange(3)
    assert send(tensor, torch.device("cpu")) is tensor
    assert send_numbers([1, 2.5], torch.device("cpu")).tolist() == [1, 2.5]


def test_to_a_device_a_copy_of_pinned_memory_is_sent_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Spy(Tensor):
        def pin_memory(self, *args: Any) -> Tensor:
            calls.append(("pin_memory", args))
            return self

        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(("to", (args, kwargs)))
            return super().to(*args)

    # The meta device stands for one that copies from pinned memory.
    monkeypatch.setattr(transfer, "PINNED", ("meta",))
    meta = torch.device("meta")
    assert send(torch.arange(3).as_subclass(Spy), meta).device == meta
    assert calls == [("pin_memory", ()), ("to", ((meta,), {"non_blocking": True}))]


def test_what_was_fetched_does_not_change_with_its_tensor() -> None:
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    fetched = Fetched(tensor)
    with torch.no_grad():
        tensor.zero_()
    assert fetched.arrived()
    assert fetched.get().tolist() == [1, 2]
    assert not fetched.get().requires_grad
