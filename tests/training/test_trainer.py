from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_vlm.training.trainer import EpochLoop, Trainer


def test_all_processes_stop_one_batch_after_rank_0_was_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")  # what Lightning calls before each batch
    sent: list[float] = []

    def broadcast(flag: torch.Tensor, src: int) -> None:
        sent.append(flag.item())

    def barrier() -> Any:
        raise RuntimeError("there is no process group")

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    monkeypatch.setattr(torch.distributed, "barrier", barrier)
    trainer = Trainer(precision="32-true", accelerator="cpu", max_steps=9, logger=False, enable_checkpointing=False)
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, EpochLoop)
    assert trainer.max_steps == 9
    loop._broadcast_sigterm_tensor()
    trainer._signal_connector.received_sigterm = True
    loop._broadcast_sigterm_tensor()
    with pytest.raises(SIGTERMException):
        loop._broadcast_sigterm_tensor()
    assert sent == [0, 1, 1]
    trainer._signal_connector.received_sigterm = False
    loop._broadcast_sigterm_tensor()  # another fit does not stop
    loop._broadcast_sigterm_tensor()
