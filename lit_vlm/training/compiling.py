"""torch.compile for the blocks of a model, each kind of block as one graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache

from lit_vlm.model.vlm import VLM

log = logging.getLogger(__name__)


def compile_blocks(model: VLM, fixed_rows: bool, backend: str = "inductor") -> list[CompiledKind]:
    """Compile the forward pass of every block of every part, in place; returns the kinds of blocks.

    Only `forward` is compiled, and recomputation inside it. Hooks stay outside of the graph: those with which FSDP2
    gathers weights, those that count blocks (`sharding.OncePerForward`), and taps. So call it on a model that is
    sharded already. Blocks of a part that are built alike share one graph.

    Args:
        model: frozen and sharded as the stage wants it; blocks that are compiled already stay as they are.
        fixed_rows: whether the rows of all batches have one length, so that graphs are first made for fixed shapes;
            otherwise for any.
        backend: name of torch's backend.
    """
    found: list[CompiledKind] = []
    for slot, parts in model.slots().items():
        for part in parts:
            kinds: dict[Any, CompiledKind] = {}
            for block in part.blocks():
                if isinstance(vars(block).get("forward"), partial):
                    continue
                alike = (type(block), tuple((name, p.shape) for name, p in block.named_parameters()))
                if alike not in kinds:
                    name = f"the blocks of {slot} {type(part).__name__} ({_class_of(block).__name__})"
                    # Numbers of pictures vary in any case.
                    fixed = fixed_rows and slot in ("embedder", "decoder")
                    kinds[alike] = CompiledKind(name, None if fixed else True, backend)
                block.forward = partial(kinds[alike], block)
            found += kinds.values()
    return found


class CompiledKind:
    """The compiled forward pass of blocks that are built alike.

    A call with a cache, which decoding makes, runs the block as it is: the cache grows with each token. So do all calls
    after torch's limit of graphs for one function is reached, which is warned of.

    Args:
        name: the blocks, for messages.
        dynamic: as for `torch.compile`.
        backend: name of torch's backend.
    """

    def __init__(self, name: str, dynamic: bool | None, backend: str) -> None:
        self.name, self._full = name, False
        self.compiled = torch.compile(_own_forward(), fullgraph=True, dynamic=dynamic, backend=backend)

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of a block.

        Raises:
            ValueError: when torch cannot compile the block as one graph.
        """
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # slow to import

        if self._full or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return _forward(block, args, kwargs)
        # Of a view, torch takes the sizes of what it is a view of for inputs, too: the first block would get other
        # graphs than the next ones.
        args = tuple(v.clone() if isinstance(v, Tensor) and v._is_view() else v for v in args)
        try:
            return self.compiled(block, args, kwargs)
        except FailOnRecompileLimitHit:
            self._full = True
            log.warning(
                "model.compile: %s were called in more ways than torch makes graphs for, and run without from now on; "
                "the environment variable TORCH_LOGS=recompiles prints why",
                self.name,
            )
            return _forward(block, args, kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"model.compile: {self.name} do not compile as one graph: {reason}. Set model.compile to null, or take "
                "another part, or another attention of this one"
            ) from error


def _forward(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _own_forward() -> Callable[..., Any]:
    """A copy of `_forward` with a code object of its own: torch counts graphs by code object, and all kinds share one.

    Most layers of transformers share one as well: the function that decides about recomputation.
    """
    return FunctionType(_forward.__code__.replace(), globals(), _forward.__name__)


def _class_of(block: nn.Module) -> type:
    """The class of a block, without the one that FSDP2 puts before it."""
    return next(kind for kind in type(block).__mro__ if not issubclass(kind, FSDPModule))
