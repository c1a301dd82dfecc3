"""Model FLOPs: how many operations a training step needs, whatever the machine does beyond that.

Counted are matrix products and convolutions, a multiplication and an addition as two operations. What a program may do
besides is not: padding, the dummy picture of a batch without images, recomputed blocks, masked attention scores, and
gradients that nothing needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_vlm.core.batch import Batch


class Flops(NamedTuple):
    """Operations of a part on one micro-batch.

    Attributes:
        forward: of the forward pass.
        inputs: of the gradients of all that weights and attention read; taken only behind something that trains.
        weights: of the gradients of weights, of those that train.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    def total(self, gradients: bool) -> float:
        """All of them; without `inputs` where no gradient passes the part."""
        return self.forward + self.weights + (self.inputs if gradients else 0.0)


FlopsOf = Callable[[Batch], Flops]
"""From a batch to the operations of a part; it holds what it needs of the part's weights, so that it is quick."""


class Weights(NamedTuple):
    """Numbers of the matrices that a vector is multiplied with.

    Attributes:
        all: how many.
        trained: how many of them train.
    """

    all: float = 0.0
    trained: float = 0.0

    @staticmethod
    def of(parameters: Iterable[nn.Parameter], experts: int | None = None) -> Weights:
        """Count matrices and kernels; biases and norms cost next to nothing.

        Args:
            parameters: of which those of two dimensions or more count.
            experts: that a token goes to, where parameters of three dimensions hold one matrix per expert.
        """
        size = trained = 0.0
        for parameter in parameters:
            if parameter.ndim > 1:
                share = experts / parameter.shape[0] if experts and parameter.ndim == 3 else 1.0
                size += share * parameter.numel()
                trained += share * parameter.numel() * parameter.requires_grad
        return Weights(size, trained)

    def on(self, vectors: float) -> Flops:
        """Products with so many vectors."""
        return Flops(2 * self.all * vectors, 2 * self.all * vectors, 2 * self.trained * vectors)


def attention(width: int, pairs: float) -> Flops:
    """Scores and weighted sums of so many pairs of a query and a key; `width` is that of all heads together."""
    return Flops(4 * width * pairs, 8 * width * pairs)


def causal_pairs(lengths: Iterable[int]) -> float:
    """Pairs where each position of a sequence sees itself and those before it: about half of all."""
    return sum(_pairs(length) for length in lengths)


def _pairs(length: int) -> float:
    return length * (length + 1) / 2


class _Counter(TorchDispatchMode):
    """Adds up the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def executed(run: Callable[[], Tensor]) -> float:
    """Operations of a computation and of its backward pass, by running it; on the meta device that takes no arithmetic.

    Args:
        run: gives the result; its gradient is taken where it needs one.
    """
    with _Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        out = run()
        if out.requires_grad:
            out.sum().backward()
    return counter.total
