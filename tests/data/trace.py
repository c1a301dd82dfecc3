"""A training loop that notes which samples it sees; `python -m tests.data.trace` runs it in several processes."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from callbacks import Sources
from lit_vlm.core.batch import Batch, PixelSpec
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data import ChatML, Interleaved, Mixture, ModalityLength, Packed, Padded, Shuffled, VLMData, Weighted
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.transforms import Resize
from lit_vlm.encoders import PatchGrid
from lit_vlm.projectors.base import same_grid
from lit_vlm.worlds import Shapes
from tests.data.made import Count

MIXTURES: dict[str, Mixture] = {
    "shuffled": Shuffled(),
    "weighted": Weighted({"shapes": 0.3, "a": 0.5, "b": 0.2}, samples=96),
    "interleaved": Interleaved(),
}
BATCHINGS = {"Padded": Padded(), "Packed": Packed(window=40), "ModalityLength": ModalityLength()}


class Stop(Exception):
    """The run is to end here, at once."""


class Trace(L.LightningModule):
    """Notes the ids of each batch; it stops in the middle of a step after `stop_after` of them."""

    def __init__(self, folder: Path, stop_after: int | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.stop_after = folder, stop_after
        self.seen: list[list[str]] = []
        self.input_spec = InputSpec(byte_tokenizer(), PixelSpec(8, 4, (0.5, 0.5, 0.5)), PatchGrid(4), same_grid)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.stop_after is not None and len(self.seen) == self.stop_after:
            raise Stop
        self.seen.append([f"{sample.source} {sample.id}" for sample in batch.samples])
        return self.weight.sum()

    def on_train_batch_end(self, *args: Any) -> None:
        if len(self.seen) == self.stop_after:
            self.trainer.save_checkpoint(self.folder / "stopped.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch


def run(
    folder: Path,
    mixture: str,
    batching: str,
    workers: int,
    stop_after: int | None = None,
    resume: bool = False,
    devices: int = 1,
    rows: int = 4,
) -> list[list[str]]:
    """Three epochs; returns the ids of each step's samples on this rank."""
    data = VLMData(
        train=[Shapes(60), Count("a", 31), Count("b", 17)],
        template=ChatML(),
        transform=Resize(),
        batch_size=rows // devices,
        max_length=96,
        mixture=MIXTURES[mixture],
        batching=BATCHINGS[batching],
        num_workers=workers,
    )
    module = Trace(folder, stop_after)
    sources = Sources()
    trainer = L.Trainer(
        callbacks=[sources],
        log_every_n_steps=2,
        default_root_dir=folder,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, data, ckpt_path=folder / "stopped.ckpt" if resume else None, weights_only=False)
    finally:
        name = f"trace-{'resumed' if resume else 'new'}-{trainer.global_rank}.json"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(module.seen))
        # Brought together, and what this rank counted since: the next logged step or checkpoint would add it.
        counts = [{s: found[s, "samples"] for s in ("shapes", "a", "b")} for found in (sources.seen, sources._new)]
        (folder / name.replace("trace", "counts")).write_text(json.dumps(counts))
    return module.seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--stop", type=int)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    with contextlib.suppress(Stop):
        run(given.folder, "weighted", "Packed", 0, given.stop, given.resume, given.devices)
