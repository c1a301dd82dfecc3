"""How fast training is, and what it waits for."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
import torch

from lit_vlm.batch import Batch, Counts
from lit_vlm.model import VLM
from lit_vlm.module import LitVLM

# Dense bf16 peak of one device in FLOP/s, without sparsity, from the vendors' data sheets.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


class Throughput(L.Callback):
    """Logs, over all devices and each `log_every_n_steps`:

    - `throughput/tokens_per_s` (without padding), `samples_per_s`, `images_per_s`;
    - `throughput/supervised`: share of tokens that carry a loss;
    - `throughput/fill`: share of positions that are not padding;
    - `throughput/data_wait`: share of the time spent waiting for the loader;
    - `throughput/mfu`: model FLOPs over the peak of the device, where that is known. It counts vision, and neither
      padding nor the weight gradients of what is frozen.

    Args:
        peak: peak FLOP/s of one device in the precision used, for devices that are not known.
    """  # noqa: D415

    def __init__(self, peak: float | None = None) -> None:
        self.peak = peak
        self._counts = Counts()
        self._flops = 0.0
        self._wait = 0.0
        self._mark = 0.0
        self._start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The batch has come."""
        self._wait += time.perf_counter() - self._mark

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and log now and then."""
        assert isinstance(pl_module, LitVLM)
        self._counts = self._counts + batch.counts
        self._flops += step_flops(pl_module.vlm, batch)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % int(getattr(trainer, "log_every_n_steps", 1)) == 0:
            self._log(trainer, pl_module)
            self._reset()
        self._mark = time.perf_counter()

    def _reset(self) -> None:
        self._counts, self._flops, self._wait = Counts(), 0.0, 0.0
        self._start = self._mark = time.perf_counter()

    def _log(self, trainer: L.Trainer, module: LitVLM) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        local = torch.tensor([*self._counts, self._flops], dtype=torch.float32, device=module.device)
        *values, flops = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        counts = dict(zip(Counts._fields, values, strict=True))
        metrics = {
            "tokens_per_s": counts["tokens"] / seconds,
            "samples_per_s": counts["samples"] / seconds,
            "images_per_s": counts["images"] / seconds,
            "supervised": counts["supervised"] / max(1.0, counts["tokens"]),
            "fill": counts["tokens"] / max(1.0, counts["positions"]),
            "data_wait": self._wait / seconds,
        }
        peak = self.peak or _known_peak(module.device)
        if peak:
            metrics["mfu"] = flops / seconds / (peak * trainer.world_size)
        module.log_dict({f"throughput/{name}": value for name, value in metrics.items()})


def step_flops(model: VLM, batch: Batch) -> float:
    """Model FLOPs of forward and backward of one micro-batch: 2 per weight and token for each of three products.

    The three are the forward, the gradient of the activations (only behind something that trains) and that of the
    weights (only of weights that train). Attention scores are added for the decoder, logits only where they are
    computed.
    """
    images = batch.images.sizes
    patches = sum(model.encoder.patch_grid(*size).num_tokens for size in images)
    counts = batch.counts
    parts = {
        "encoder": (model.encoder.parameters(), patches),
        "projector": (model.projector.parameters(), counts.visual_tokens),
        "decoder": ((p for block in model.decoder.blocks() for p in block.parameters()), counts.tokens),
        "logits": (model.decoder.head_parameters(), counts.supervised),
    }
    total, upstream = 0.0, False
    for parameters, tokens in parts.values():
        matrices = [p for p in parameters if p.ndim > 1]
        size = sum(p.numel() for p in matrices)
        trained = sum(p.numel() for p in matrices if p.requires_grad)
        total += 2.0 * tokens * (size * (1 + upstream) + trained)
        upstream = upstream or trained > 0
    average = counts.tokens / max(1, counts.samples)
    scores = 2.0 * model.decoder.num_layers * model.decoder.width * counts.tokens * average  # causal half of 4
    return total + scores * (1 + 2 * upstream)


def _known_peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)
