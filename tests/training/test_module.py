"""What a step divides its losses by."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests.callbacks.test_callbacks import lit, trainer
from tests.tiny import batch_of, tiny_vlm


@pytest.mark.filterwarnings("ignore")
def test_batches_that_do_not_know_their_step_are_not_accumulated(tmp_path: Path) -> None:
    batches = DataLoader([batch_of(tiny_vlm())] * 4, batch_size=None)  # type: ignore[arg-type]
    trainer(tmp_path, max_steps=1).fit(lit(), batches)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches is above 1, .* \(Batch.window\)"):
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=2).fit(lit(), batches)
