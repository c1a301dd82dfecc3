"""Which layers of a vision transformer are read, and what becomes of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Merge = Literal["concat", "sum"]


@dataclass(frozen=True)
class ReadLayers:
    """Layers that are read, merged token by token.

    Attributes:
        indices: layers in the order in which they are merged: 0 the embeddings, l the output of block l.
        merge: `concat` puts features side by side, `sum` adds them.
    """

    indices: tuple[int, ...]
    merge: Merge

    @classmethod
    def of(cls, layer: int | list[int], merge: Merge, depth: int, what: str) -> ReadLayers:
        """The layers that a setting names.

        Args:
            layer: index into the hidden states, from the end where it is negative; or several.
            merge: see the class.
            depth: number of blocks.
            what: the model, for messages.

        Raises:
            ValueError: for a layer that there is not, none, one that is named twice, or the embeddings among several.
        """
        given = layer if isinstance(layer, list) else [layer]
        indices = tuple(one if one >= 0 else depth + 1 + one for one in given)
        for one, index in zip(given, indices, strict=True):
            if not 0 <= index <= depth:
                raise ValueError(f"layer {one} is not one of the {depth + 1} hidden states of {what}")
        if not indices or len(set(indices)) < len(indices) or (len(indices) > 1 and 0 in indices):
            raise ValueError(f"layer {layer}: name one layer, or several different ones behind the embeddings")
        return cls(indices, merge)

    @property
    def last(self) -> int:
        """The last layer that is read; blocks behind it are not needed."""
        return max(self.indices)

    @property
    def from_last(self) -> int | list[int]:
        """The setting for a model that ends with the last block that is read."""
        read = [index - self.last - 1 for index in self.indices]
        return read[0] if len(read) == 1 else read

    @property
    def times(self) -> int:
        """How many times as wide as one layer the result is."""
        return len(self.indices) if self.merge == "concat" else 1

    def states(self, run: Callable[[], Tensor], blocks: Sequence[nn.Module]) -> Tensor:
        """The merged states.

        Args:
            run: runs the model, and returns the states of its last block, before any norm.
            blocks: its blocks.

        Returns:
            states `[..., d · times]`.
        """
        if len(self.indices) == 1:
            return run()
        found: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for index in self.indices:

                def keep(_module: nn.Module, _args: Any, out: Any, index: int = index) -> None:
                    found[index] = out[0] if isinstance(out, tuple) else out

                hooks.callback(blocks[index - 1].register_forward_hook(keep).remove)
            run()
        return self.merged([found[index] for index in self.indices])

    def merged(self, states: Sequence[Tensor]) -> Tensor:
        """The states `[..., d]` of the layers, in their order, as one: `[..., d · times]`."""
        if len(states) == 1:
            return states[0]
        return torch.cat(list(states), -1) if self.merge == "concat" else torch.stack(list(states)).sum(0)
