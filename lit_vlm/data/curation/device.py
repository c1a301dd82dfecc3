"""Measures that a device computes: what it needs is made ready by the processes that decode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from numpy.typing import NDArray

from lit_vlm.data.curation.step import Measure, Sample


class DeviceMeasure(Measure):
    """A measure by a model, of which each device holds one.

    Processes that decode call `ready`, and the one that holds the model calls `compute` meanwhile.
    """

    @abstractmethod
    def ready(self, samples: Sequence[Sample]) -> Any:
        """What `compute` needs of a batch, such as resized pictures; without weights, as each such process calls it."""

    @abstractmethod
    def on(self, device: str) -> Self:
        """The same measure, with its model on a device such as `cuda:1`."""

    @abstractmethod
    def compute(self, ready: Any) -> Mapping[str, NDArray[Any]]:
        """Measure a batch by what `ready` gave: what calling the measure gives."""

    def __call__(self, samples: Sequence[Sample]) -> Mapping[str, NDArray[Any]]:
        """Measure a batch in one go."""
        return self.compute(self.ready(samples))
