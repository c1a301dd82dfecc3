"""Inside a step the host never waits for the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from lit_vlm.commands.fit import lightning_cli
from lit_vlm.training.waits import Waits
from tests.gpu.systems import words_of


class Watch(L.Callback):
    """Records waits from the end of the second step to the end of the fourth."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.waits.__enter__()
        elif trainer.global_step == 4:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize(("recipe", "stage"), [("llava15", "1_align"), ("llava15", "2_sft"), ("ola_vlm", "1_pretrain")])
def test_a_step_does_not_wait_for_the_gpu(recipe: str, stage: str, tmp_path: Path) -> None:
    flags = ["--trainer.logger", "false", "--trainer.limit_val_batches", "0", "--trainer.max_steps", "5",
             "--trainer.log_every_n_steps", "100", "--trainer.enable_progress_bar", "false",
             "--trainer.default_root_dir", str(tmp_path), "--checkpoint.every_n_steps", "100"]  # fmt: skip
    cli: Any = lightning_cli(words_of(recipe, stage, *flags), run=False)
    watch = Watch()
    cli.trainer.callbacks.append(watch)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert watch.waits.unwanted() == {}
