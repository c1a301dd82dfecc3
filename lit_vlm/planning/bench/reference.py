"""The same samples through transformers' own `LlavaForConditionalGeneration`, unpacked, in a plain training step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import LlavaForConditionalGeneration

from lit_vlm.checkpoints.published import check_form
from lit_vlm.checkpoints.published.llava_hf import llava_parts
from lit_vlm.checkpoints.published.llava_written import llava_config
from lit_vlm.core.batch import Batch, Counts
from lit_vlm.core.lora import has_adapters
from lit_vlm.core.part import empty_parameters, meta_parameters
from lit_vlm.core.precision import DTYPES, autocast
from lit_vlm.core.progress import progress
from lit_vlm.data import VLMData
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.loader import SourceDataset, assemble
from lit_vlm.data.feed.plan import Place
from lit_vlm.encoders import Encoder
from lit_vlm.heads import Head
from lit_vlm.model.build import build_on_meta
from lit_vlm.planning.bench.job import WARMUP, BenchJob, Reference
from lit_vlm.planning.bench.step import draw
from lit_vlm.planning.stages import Stages, built
from lit_vlm.training.module import LitVLM


def reference_inputs(encoder: Encoder, batch: Batch, image_id: int) -> dict[str, Tensor]:
    """What transformers' model takes for a padded batch.

    Args:
        encoder: normalises the pictures, which have one size.
        batch: a sample per row.
        image_id: id of the image token.
    """
    ids = batch.input_ids.clone()
    ids.view(-1)[batch.image_positions] = image_id
    inputs = {"input_ids": ids, "attention_mask": (batch.segment_ids > 0).long(), "labels": batch.labels}
    for _, pictures in batch.images.groups() if len(batch.images) else ():
        inputs["pixel_values"] = encoder.normalise(pictures, torch.float32)
    return inputs


def check_reference(module: LitVLM) -> None:
    """Check that transformers' model can be what a stage trains.

    Args:
        module: with its model, whose parameters may be on the meta device.

    Raises:
        ValueError: for another composition, images that see all of themselves, other losses, adapters, or several
            processes.
    """
    asked = "--against hf compares with transformers' LlavaForConditionalGeneration"
    try:
        check_form(module.vlm, "llava-hf")
        encoder = llava_parts(module.vlm)[0]
    except ValueError as error:
        raise ValueError(f"{asked}: {error}") from error
    if encoder.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"{asked}, whose encoder is CLIP or SigLIP, not {encoder.config.model_type}")
    heads = [
        name for name, head in module.vlm.heads.items() if isinstance(head, Head) and module.stage.losses.get(name)
    ]
    if heads:
        raise ValueError(f"{asked}, which has no head: set model.stage.losses.{heads[0]} to 0")
    if adapted := [slot for slot, parts in module.vlm.slots().items() if any(map(has_adapters, parts))]:
        raise ValueError(f"{asked}, without adapters, and here the {adapted[0]} has some: set model.lora to null")
    if module.trainer.world_size > 1:
        raise ValueError(
            f"{asked} on one device, and this stage runs on {module.trainer.world_size}: --strategy single"
        )


def run_reference(job: BenchJob, stages: Stages) -> Reference:
    """Train transformers' model on the samples that the stage would be measured with.

    The step is a plain one, with what transformers' Trainer would set: autocast, gradient checkpointing, the fused
    AdamW. Frozen weights are stored in the type of the computation, as LLaVA's own scripts do. Loading is not timed,
    so the figure is the best that a Trainer around it could reach.

    Raises:
        ValueError: as `check_reference`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cli, _ = built(job.words, job.statistics, 1, stages, folder)
        module, data, trainer = cli.model, cli.datamodule, cli.trainer
        module.model = build_on_meta(module.slots)
        module.stage.freeze(module.model, module.slots.removed_heads)
        module.trainer = trainer
        check_reference(module)
        device = trainer.strategy.root_device
        training = _Training(module, device, str(trainer.precision))
        batches = _padded(module, data, trainer.accumulate_grad_batches)
        seconds: list[float] = []
        counts = Counts()
        with progress(f"{job.stage}: steps of transformers", WARMUP + job.steps) as tell:
            for step in range(WARMUP + job.steps):
                if step == WARMUP and device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                micro_batches = [next(batches) for _ in range(trainer.accumulate_grad_batches)]
                took = training.step(micro_batches)
                if step >= WARMUP:
                    seconds.append(took)
                    counts = sum((batch.counts for batch in micro_batches), counts)
                tell(1)
        cuda = device.type == "cuda"
        return Reference(
            seconds,
            {name: float(value) for name, value in counts._asdict().items()},
            torch.cuda.max_memory_allocated() if cuda else 0,
            torch.cuda.max_memory_reserved() if cuda else 0,
            training.attention,
        )


def _padded(module: LitVLM, data: VLMData, accumulate: int) -> Iterator[Batch]:
    """Yield the micro-batches of the stage without packing: the same samples, each in a row of its own, for ever."""
    spec = module.input_spec
    sources = data.train_sources
    plan = data.plan(sources, spec, 0, GlobalBatch(data.batch_size, 1, accumulate), shuffle=True)
    dataset = SourceDataset(sources, data.train_sample_encoder(spec))
    collate = data.collator(spec)
    while True:
        for places in plan:
            alone = [Place(row, place.sample) for row, place in enumerate(places)]
            batch = assemble([dataset[place] for place in alone], collate)
            if batch.samples:
                yield batch


class _Training:
    """Transformers' model in training, with the sizes, the attention and the trained slots of a stage.

    Args:
        module: with its model on the meta device, frozen as the stage says.
        device: where it trains.
        precision: of the trainer.
    """

    def __init__(self, module: LitVLM, device: torch.device, precision: str) -> None:
        encoder, projector, decoder = llava_parts(module.vlm)
        self.encoder, self.device, self.precision = encoder, device, precision
        self.image_id = decoder.vocab_size
        with meta_parameters():
            model = LlavaForConditionalGeneration(llava_config(encoder, decoder, self.image_id))
        model.set_attn_implementation(decoder.attention)
        self.attention = decoder.attention
        empty_parameters(model, device)
        model.to(device)
        parts = {
            model.model.vision_tower: not encoder.frozen(),
            model.model.multi_modal_projector: not projector.frozen(),
            model.model.language_model: not decoder.frozen(),
            model.lm_head: not decoder.frozen(),
        }
        for part, trains in parts.items():
            part.requires_grad_(trains)
            if not trains:
                part.to(DTYPES.get(precision, torch.float32))
        draw(model.parameters())
        if decoder.recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        if encoder.frozen():
            model.model.vision_tower.eval()
        self.model = model
        self.optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(self, batches: list[Batch]) -> float:
        """One optimizer step; returns its seconds."""
        made = [reference_inputs(self.encoder, batch, self.image_id) for batch in batches]
        given = [{name: value.to(self.device) for name, value in inputs.items()} for inputs in made]
        self._wait()
        start = time.perf_counter()
        for inputs in given:
            with autocast(self.precision, self.device.type):
                loss = self.model(**inputs, use_cache=False).loss
            (loss / len(given)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
