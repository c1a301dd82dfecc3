"""Model FLOPs: how many operations a training step needs, whatever the machine does beyond that.

Matrix products and convolutions are counted; a multiplication with its addition is two operations. Work that a program
may do besides is not counted: padding, the dummy picture of a batch without images, recomputed blocks, masked attention
scores, and gradients that nothing needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_vlm.core.batch import Batch
from lit_vlm.core.quantised import weights_in


class Flops(NamedTuple):
    """Operations of a part on one micro-batch.

    Attributes:
        forward: operations of the forward pass.
        inputs: operations for the gradients of the inputs of weights and of attention. A backward pass takes them only
            where something in front of the part trains, or an earlier layer of it.
        weights: operations for the gradients of the weights that train.
    """

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(*(a + b for a, b in zip(self, other, strict=True)))

    def total(self, gradients: bool) -> float:
        """Operations of forward and backward pass together.

        Args:
            gradients: whether the backward pass goes through this part; if not, `inputs` is left out.
        """
        return self.forward + self.weights + (self.inputs if gradients else 0.0)


FlopsOf = Callable[[Batch], Flops]
"""Batch → operations of a part. The function holds the numbers that it needs of the part's weights, so it is quick."""


class Weights(NamedTuple):
    """How many weights the matrices have that a vector is multiplied with.

    Attributes:
        all: number of weights.
        trained: number of those that train.
    """

    all: float = 0.0
    trained: float = 0.0

    @staticmethod
    def of(parameters: Iterable[nn.Parameter], experts: int | None = None) -> Weights:
        """Count matrices and kernels; biases and norms cost next to nothing.

        Args:
            parameters: parameters of a module; those with fewer than two dimensions do not count.
            experts: number of experts that a token goes to, where parameters of three dimensions hold one matrix per
                expert; None: no mixture of experts.
        """
        size = trained = 0.0
        for parameter in parameters:
            if parameter.ndim > 1:
                share = experts / parameter.shape[0] if experts and parameter.ndim == 3 else 1.0
                size += share * weights_in(parameter)
                trained += share * weights_in(parameter) * parameter.requires_grad
        return Weights(size, trained)

    def on(self, vectors: float) -> Flops:
        """Operations of multiplying this number of vectors with the matrices."""
        return Flops(2 * self.all * vectors, 2 * self.all * vectors, 2 * self.trained * vectors)


def attention(width: int, pairs: float) -> Flops:
    """Operations of attention: scores, and weighted sums of the values.

    Args:
        width: width of all query heads together.
        pairs: pairs of a query and a key.
    """
    return Flops(4 * width * pairs, 8 * width * pairs)


def causal_pairs(lengths: Iterable[int]) -> float:
    """Pairs of a query and a key over all sequences, where each position sees itself and those before it."""
    return sum(_pairs(length) for length in lengths)


def pairs_ahead(lengths: Iterable[int]) -> float:
    """Pairs of a query and a key behind it, where all positions of each of these sequences see each other."""
    return sum(_pairs(length - 1) for length in lengths)


def _pairs(length: int) -> float:
    return length * (length + 1) / 2


_KERNELS = ("flash", "efficient", "cudnn")
_ATTENTION = {
    f"_scaled_dot_product_{kernel}_attention{suffix}": suffix == "_backward"
    for kernel in _KERNELS
    for suffix in ("", "_backward")
}
"""Fused attention → whether it is the backward pass, in which the gradient stands before query, key and value."""


def operations_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Operations of one call that PyTorch dispatches: its own counter's figure; 0 for what is no matrix product.

    Some versions of that counter refuse fused attention whose keys have fewer heads than its queries, so attention is
    counted here: two products in the forward pass, five in the backward pass, which computes the scores again.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: its arguments by name.
        out: its result.
    """
    backward = _ATTENTION.get(func._overloadpacket.__name__)
    if backward is not None and func.namespace == "aten":
        query, _, value = args[int(backward) : int(backward) + 3]
        score = query.shape.numel() * value.shape[-2]
        weighted = query.shape[:-1].numel() * value.shape[-2] * value.shape[-1]
        return 2.0 * (3 * score + 2 * weighted if backward else score + weighted)
    formula = flop_registry.get(func._overloadpacket)
    return float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0


class _Counter(TorchDispatchMode):
    """Adds up the operations of all calls inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count it."""
        out = func(*args, **(kwargs or {}))
        self.total += operations_of(func, args, kwargs or {}, out)
        return out


def executed(run: Callable[[], Tensor]) -> float:
    """Count the operations of a computation and of its backward pass by running it.

    On the meta device that takes no arithmetic.

    Args:
        run: the computation; the backward pass runs where its result needs a gradient.
    """
    with _Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        out = run()
        if out.requires_grad:
            out.sum().backward()
    return counter.total
