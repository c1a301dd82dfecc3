"""Copies between host and device that the host does not wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PINNED = ("cuda",)
"""Types of devices that copy from pinned memory of the host while the host goes on."""


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, which does not wait for it; a tensor that is there already stays.

    The copy is made from pinned memory of its own, which torch does not give away before it has left.

    Args:
        tensor: on the CPU, of any shape.
        device: where it is needed.
    """
    if device.type in PINNED and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def send_numbers(numbers: Iterable[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Plain numbers as a tensor `[n]` on a device, which the host does not wait for."""
    return send(torch.tensor(list(numbers), dtype=dtype), device)


def on_host(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Plain numbers as metrics that stay on the host; Lightning would copy each number to the device, and wait."""
    return {name: torch.tensor(float(value), device="cpu") for name, value in values.items()}


class Fetched:
    """A copy of a tensor to the host that is on its way while the host goes on.

    Args:
        tensor: what is copied; it may be overwritten afterwards.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.device.type in PINNED:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.cpu().clone()

    def arrived(self) -> bool:
        """Whether `get` would not wait."""
        return self._event is None or self._event.query()

    def get(self) -> Tensor:
        """The copy on the CPU; waits until the device has come to where the copy was asked for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
