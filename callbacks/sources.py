"""Counts of what a run has seen of each source."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning.pytorch as L
import torch

from lit_vlm.core.batch import Batch
from lit_vlm.core.transfer import on_host
from lit_vlm.data import VLMData

KINDS = ("samples", "tokens", "supervised", "images")


class Sources(L.Callback):
    """Logs, over all devices and since the start of the run, at each `log_every_n_steps`:

    - `data/samples/SOURCE`, `data/tokens/SOURCE` (visual ones too), `data/supervised/SOURCE`, `data/images/SOURCE`;
    - `data/epochs/SOURCE`: samples seen, over the size of the source.

    The counts are in the checkpoint, so a resumed run goes on counting.
    """  # noqa: D415

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self._new: Counter[tuple[str, str]] = Counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and log each `log_every_n_steps`."""
        for sample in batch.samples:
            counted = (1, sample.num_tokens, sample.num_supervised, sample.num_images)
            for kind, count in zip(KINDS, counted, strict=True):
                self._new[sample.source, kind] += count
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % int(getattr(trainer, "log_every_n_steps", 1)) == 0:
            self._gather(trainer, pl_module)
            self._log(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sum the counts over all ranks, which all call this, so that rank 0 saves the total."""
        self._gather(trainer, pl_module)
        checkpoint["sources"] = [[source, kind, count] for (source, kind), count in self.seen.items()]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from the counts of the checkpoint."""
        self.seen = Counter({(source, kind): count for source, kind, count in checkpoint.get("sources", [])})

    def _gather(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        keys = [(name, kind) for name in _sizes(trainer) for kind in KINDS]
        # Integers, as fp32 rounds numbers above 2²⁴.
        counts = torch.tensor([self._new[key] for key in keys], dtype=torch.int64, device=module.device)
        summed = trainer.strategy.reduce(counts, reduce_op="sum")
        self.seen.update(dict(zip(keys, summed.tolist(), strict=True)))
        self._new.clear()

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        sizes = _sizes(trainer)
        metrics = {f"data/{kind}/{name}": float(self.seen[name, kind]) for name in sizes for kind in KINDS}
        metrics |= {f"data/epochs/{name}": self.seen[name, "samples"] / max(1, size) for name, size in sizes.items()}
        module.log_dict(on_host(metrics))


def _sizes(trainer: L.Trainer) -> dict[str, int]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, VLMData)
    sizes: Counter[str] = Counter()
    for source in data.train_sources:
        sizes[source.name] += len(source)
    return dict(sizes)
