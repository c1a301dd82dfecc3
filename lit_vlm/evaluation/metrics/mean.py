"""Scores that are means over questions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanScore(Metric):
    """A mean over questions of a score of one answer, from 0 to 1."""

    total: Tensor
    count: Tensor
    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @staticmethod
    @abstractmethod
    def of(answer: str, references: Sequence[str]) -> float:
        """The score of one answer, from 0 to 1.

        Args:
            answer: what the model wrote.
            references: right answers, one or more.
        """

    def update(self, answer: str, references: Sequence[str]) -> None:
        """Add one answer."""
        self.total += self.of(answer, references)
        self.count += 1

    def compute(self) -> Tensor:
        """The mean, from 0 to 1."""
        return self.total / self.count.clamp(min=1)
