"""A check that frozen parameters stay as they are."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_vlm.training.module import LitVLM
from lit_vlm.training.sharding import reshard
from lit_vlm.training.stage import frozen_tensors


class FreezeGuard(L.Callback):
    """Checks at the end of training that every frozen parameter and buffer is the same, bit for bit, as at the start.

    Each tensor is reduced to one number on its device, so this costs a pass over the weights and no memory.
    """

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a hash of each frozen tensor."""
        assert isinstance(pl_module, LitVLM)
        self._before = {name: _hash(tensor) for name, tensor in frozen_tensors(pl_module.vlm).items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the frozen tensors with those at the start.

        Raises:
            RuntimeError: naming the frozen tensors that changed.
        """
        assert isinstance(pl_module, LitVLM)
        reshard(pl_module.vlm)  # a validation may have left the root unit gathered
        after = frozen_tensors(pl_module.vlm)
        changed = [name for name, before in self._before.items() if not torch.equal(before, _hash(after[name]))]
        if changed:
            raise RuntimeError(
                f"{len(changed)} frozen tensors changed in stage '{pl_module.stage.name}', first {changed[:5]}: "
                "something updates them outside the optimizer"
            )


@torch.no_grad()
def _hash(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return torch.hash_tensor(local.detach()) if local.numel() else torch.zeros((), dtype=torch.uint64)
