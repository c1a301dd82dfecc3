"""An exponential moving average of the weights that train.

Lightning's `EMAWeightAveraging` and torch's `AveragedModel`, which it is made of, copy the whole module: frozen parts,
tables and teachers too, and before it is sharded, where a module builds itself in `configure_model`. Their average has
the type of the weights, and is read from single files alone. Here only what trains is averaged, each process averages
the shards that it has, in fp32, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_vlm.checkpoints.weights import EMA, PREFIX, RAW
from lit_vlm.model.vlm import VLM
from lit_vlm.training.sharding import reshard

STATE = "state_dict"


class Averaged(NamedTuple):
    """A weight, or a running statistic, and its average.

    Attributes:
        names: all its names in a checkpoint.
        weight: as training left it, or the average while that is in use.
        average: fp32, sharded as the weight is.
    """

    names: list[str]
    weight: Tensor
    average: Tensor


class WeightAverage:
    """An exponential moving average of the weights that train, as in Tarvainen & Valpola 2017 (arXiv 1703.01780).

    After step n the average moves to the weights by the share 1 − min(decay, (1 + n) / (10 + n)), so that in a short
    stage it does not hang on the weights that the stage began with: the rule of TensorFlow's
    `ExponentialMovingAverage(num_updates=...)`.

    Running statistics of modules that train (batch norm) are averaged too: those of a step do not go with the averages.

    In every checkpoint the averages stand in the place of the weights, where all that reads weights finds them. What
    training goes on with stands beside them.

    Args:
        model: after `Stage.freeze`, on its device, sharded or not.
        decay: between 0 and 1.
    """

    def __init__(self, model: VLM, decay: float) -> None:
        reshard(model)  # what a forward pass gathered is not what trains
        self.decay, self._model = decay, model
        self._raw: list[Tensor] | None = None
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(PREFIX + name)
        self._weights = [
            Averaged(names[id(p)], p, p.detach().to(torch.float32, copy=True))
            for p in model.parameters()
            if p.requires_grad
        ]
        self._weights += [
            Averaged([PREFIX + name], buffer, buffer.detach().to(torch.float32, copy=True))
            for name, buffer in _statistics(model)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The averages."""
        return [one.average for one in self._weights]

    @property
    def in_use(self) -> bool:
        """Whether the model has the averages in the place of its weights."""
        return self._raw is not None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights of an optimizer step into the average.

        Args:
            step: number of steps so far, this one included.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for one in self._weights:
            local(one.average).lerp_(local(one.weight).float(), share)

    @torch.no_grad()
    def use(self) -> None:
        """Put the averages in the place of the weights, which are kept."""
        assert not self.in_use
        reshard(self._model)
        self._raw = [one.weight.detach().clone() for one in self._weights]
        for one in self._weights:
            local(one.weight).copy_(local(one.average))

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the weights back in their place."""
        assert self._raw is not None
        reshard(self._model)  # the root unit has the averages gathered, and would train with them
        for one, raw in zip(self._weights, self._raw, strict=True):
            local(one.weight).copy_(local(raw))
        self._raw = None

    def record(self, checkpoint: dict[str, Any], saved: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
        """Put the averages into a checkpoint, and what training goes on with beside them, if the optimizer is there.

        Args:
            checkpoint: as Lightning saves it.
            saved: what a checkpoint holds of sharded tensors (`FSDP2.for_checkpoint`); it may gather.
        """
        state: dict[str, Tensor] = checkpoint[STATE]
        raws = self._raw or [one.weight.detach() for one in self._weights]
        kept: dict[str, Tensor] = {}
        goes_on = "optimizer_states" in checkpoint
        for one, raw in zip(self._weights, raws, strict=True):
            first = one.names[0]
            averages, weights = saved({first: one.average}), saved({first: raw}) if goes_on else {}
            for name in filter(state.__contains__, one.names):
                state[name] = averages[first]
                kept |= {name: weights[first]} if goes_on else {}
        if goes_on:
            checkpoint |= {EMA: self.decay, RAW: kept}

    @torch.no_grad()
    def read(self, path: Path) -> None:
        """Take weights and averages from a checkpoint, whole or sharded, whatever number of processes wrote it.

        Args:
            path: a checkpoint that `record` was called for.
        """
        if path.is_dir():
            known = FileSystemReader(path).read_metadata().state_dict_metadata
            named = {next(n for n in one.names if f"{RAW}.{n}" in known): one for one in self._weights}
            state = {
                STATE: {name: one.average for name, one in named.items()},
                RAW: {name: one.weight.detach() for name, one in named.items()},
            }
            load(state, storage_reader=FileSystemReader(path))
            return
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for one in self._weights:
            name = next(n for n in one.names if n in saved[RAW])
            _fill(one.average, saved[STATE][name])
            _fill(one.weight, saved[RAW][name])


def _statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that a checkpoint has of modules whose own weights train, with their names."""
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            kept = module.state_dict(keep_vars=True).keys()
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name in kept:
                    yield f"{prefix}.{name}" if prefix else name, buffer


def check_resumed(checkpoint: Mapping[str, Any], decay: float | None) -> None:
    """Check that a run goes on averaging as it began.

    Args:
        checkpoint: as Lightning loads it.
        decay: `model.stage.ema` of this run.

    Raises:
        ValueError: where only one of the two averages.
    """
    began = checkpoint.get(EMA)
    if (began is None) == (decay is None):
        return
    if decay is None:
        raise ValueError(
            f"--ckpt_path: this run began with model.stage.ema {began:g}, so its checkpoint has averaged weights: set "
            f"model.stage.ema to {began:g}, or begin a new stage with them by model.stage.start_from"
        )
    raise ValueError(
        f"--ckpt_path: model.stage.ema is {decay:g}, and the checkpoint has no average to go on with: set "
        "model.stage.ema to null, as this run began, or begin a new stage by model.stage.start_from"
    )


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which all processes have, into one that may be sharded."""
    if isinstance(target, DTensor):
        placed = whole.to(target.device)
        local(target).copy_(local(distribute_tensor(placed, target.device_mesh, target.placements, src_data_rank=None)))
    else:
        target.copy_(whole)
