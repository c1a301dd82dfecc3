"""How text is continued."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How one row is continued.

    Attributes:
        max_new_tokens: tokens at most.
        temperature: 0 takes the likeliest token; above 0 a token is drawn.
        top_p: draw from the smallest set of likeliest tokens whose probabilities add up to this.
        seed: of a generator of the row's own, so that what is drawn does not depend on the other rows; None draws from
            PyTorch's global generator.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
