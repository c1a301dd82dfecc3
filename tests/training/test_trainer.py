from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lit_vlm.training.leaving import Leaving, Preempted
from lit_vlm.training.trainer import EpochLoop, Trainer


def test_what_is_replaced_of_lightning_is_there() -> None:
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")  # what it calls before each batch
    assert hasattr(_TrainingEpochLoop, "_accumulated_batches_reached")
    assert hasattr(_SignalConnector, "register_signal_handlers")


def test_processes_leave_together_one_batch_after_any_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[float] = []

    def all_reduce(flag: torch.Tensor) -> None:  # this process is one of two; the other is asked before its third batch
        flag += float(len(sums) == 2)
        sums.append(flag.item())

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    leaving, cpu = Leaving(), torch.device("cpu")
    assert [leaving.agreed(2, cpu) for _ in range(5)] == [False, False, False, True, True]
    assert sums == [0, 0, 1, 0]
    with pytest.raises(Preempted, match="another process was asked to leave") as info:
        leaving.leave()
    assert info.value.code == 75
    leaving.forget()
    assert not leaving.agreed(2, cpu)


def test_a_run_leaves_where_no_gradients_wait_for_more_batches() -> None:
    trainer = Trainer(
        precision="32-true", accelerator="cpu", devices=1, max_steps=9, accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, EpochLoop)
    assert trainer.max_steps == 9
    told: list[str] = []
    trainer.leaving.go = told.append
    trainer.leaving.late = lambda: "time"
    loop.batch_progress.current.ready = 1
    loop._leave_if_asked()
    loop.batch_progress.current.ready = 2
    with pytest.raises(Preempted, match="time"):
        loop._leave_if_asked()
    assert told == ["time"]


def test_what_comes_behind_the_last_step_is_done_after_an_interruption(tmp_path: Path) -> None:
    class Ends(L.Callback):
        cut = True
        ends = 0

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            if self.cut:
                raise KeyError("the process is gone")
            Ends.ends += 1

    def fit(ckpt_path: Path | None) -> Trainer:
        trainer = Trainer(
            precision="32-true", accelerator="cpu", devices=1, max_steps=2, logger=False, callbacks=[Ends()],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(BoringModel(), ckpt_path=ckpt_path)
        return trainer

    with pytest.raises(KeyError, match="the process is gone"):
        fit(None)
    Ends.cut = False
    assert fit(tmp_path / "last.ckpt").global_step == 2
    assert Ends.ends == 1
