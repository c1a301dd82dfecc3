"""Probes: how well a teacher's features can be predicted from each layer of a frozen model (OLA-VLM's study)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import get_cosine_schedule_with_warmup

from lit_vlm.core.batch import Batch, VisualTokens
from lit_vlm.core.precision import choose
from lit_vlm.data.records import Message, Record, RecordError, Text
from lit_vlm.data.sample.collate import make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sources import Source
from lit_vlm.evaluation.asker import Asker
from lit_vlm.heads import EmbeddingDistillation, Tap
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import Teacher
from lit_vlm.worlds.scenes.maps import SHAPE_SHARES

NAME, OTHER = "probe", "segmentation"
PROMPT = "\nDescribe the image in two lines."
DEPTH_MARGIN = 0.5
"""Number of depth ranges by which two cells differ, at least, to be a pair whose order is scored."""


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained.

    Attributes:
        steps: optimizer steps.
        batch_size: pictures per step.
        lr: peak learning rate; warm-up over 3 % of the steps, then cosine to 0, as published. The published 1e-3 is for
            thousands of steps: AdamW moves no weight by more than their number times the rate, and the last norm's must
            shrink to the size of the targets.
        held_out: number of pictures that probes are measured on.
        seed: draws the probes' initial weights and the order of pictures.
    """

    steps: int = 300
    batch_size: int = 16
    lr: float = 1e-2
    held_out: int = 256
    seed: int = 0


@dataclass(frozen=True)
class ProbeResult:
    """What the probe of each layer reached, the first block first.

    Attributes:
        cosine: cosine between prediction and target, each image's features as one vector; mean of held-out images.
        score: where the targets are exact maps, the share of right depth orders, or mIoU; else empty.
        score_name: name of that score; "" without one.
    """

    cosine: list[float]
    score: list[float]
    score_name: str


class _Pictures(Dataset[Sample | None]):
    """A prompt for each record: its first image and a fixed question; None where the image cannot be read."""

    def __init__(self, source: Source, encode: SampleEncoder) -> None:
        self.source, self.encode = source, encode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample | None:
        try:
            image = self.source.record(index).images[0]
            record = Record(str(index), NAME, (Message("user", (image, Text(PROMPT))), Message("assistant", ())))
            return self.encode(record, self.source.image_folder)
        except (RecordError, IndexError):
            return None


def probe(
    asker: Asker, teacher: Teacher, train: Source, held_out: Source, settings: ProbeSettings, workers: int = 0
) -> Iterator[int | ProbeResult]:
    """Train one probe for each layer of a frozen model, all of them together, and measure them.

    Args:
        asker: has the model that is probed; its weights do not change.
        teacher: gives the targets.
        train: pictures that probes learn from.
        held_out: pictures that probes are measured on.
        settings: how probes are trained.
        workers: loader processes.

    Yields:
        the number of each finished step, and at last the result.

    Raises:
        ValueError: when no picture of a source can be read.
    """
    model = asker.module.vlm.eval().requires_grad_(False)
    device = asker.module.device
    precision = choose(device.type, scaled=False)
    encode = _encoder(asker, teacher)
    names = tuple(encode.spec.known)

    def join(samples: Sequence[Sample | None]) -> Batch:
        return make_rows([[sample] for sample in samples if sample is not None], prepared=names)

    shown = DataLoader(_Pictures(train, encode), settings.batch_size, collate_fn=join)
    first = next((batch for batch in shown if batch.image_grids), None)
    if first is None:
        raise ValueError(f"lit-vlm probe: no picture of {train.name} can be read")
    targets = _targets(teacher, first.to(device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probes = _probes(model, teacher, targets.grids[0].num_tokens).to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    total = settings.steps * settings.batch_size
    pictures = _Pictures(train, encode)
    sampler = RandomSampler(pictures, num_samples=total, generator=generator)
    batches = DataLoader(pictures, settings.batch_size, sampler=sampler, num_workers=workers, collate_fn=join)
    optimizer = AdamW(probes.parameters(), lr=settings.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, -(-3 * settings.steps // 100), settings.steps)
    for step, batch in enumerate(batches, 1):
        if batch.samples:
            moved = batch.to(device)
            with precision.autocast(device.type):
                loss = probes(_states(model, moved), moved, moved.prepared.get(NAME) or moved.teacher_images.get(NAME))
            optimizer.zero_grad()
            (loss / len(moved.image_grids)).backward()
            optimizer.step()
        schedule.step()
        yield step
    shown = DataLoader(_Pictures(held_out, encode), settings.batch_size, num_workers=workers, collate_fn=join)
    yield _measure(model, probes, teacher, (batch.to(device) for batch in shown if batch.samples))


def _encoder(asker: Asker, teacher: Teacher) -> SampleEncoder:
    """An encoder of prompts with the pictures or maps of the probes' teacher, without those of the model's heads."""
    known = {} if teacher.known is None else {NAME: teacher.known, OTHER: "segmentation"}
    pixels = {NAME: teacher.pixels} if teacher.known is None else {}
    spec = replace(asker.spec, teacher_pixels=pixels, known=known)
    return asker.format.sample_encoder(spec, prompt=True)


def _probes(model: VLM, teacher: Teacher, count: int) -> EmbeddingDistillation:
    """A predictor for each layer, with queries of its own, which reads all positions of a sample."""
    head = EmbeddingDistillation(
        model.decoder.width,
        model.decoder.num_layers,
        lambda: teacher,
        layers=list(range(1, model.decoder.num_layers + 1)),
        num_targets=count,
        queries="own",
        inner_width=teacher.width,
        contrastive=0.0,
    )
    head.connect(model.embedder)
    return head


@torch.no_grad()
def _states(model: VLM, batch: Batch) -> Mapping[Tap, Tensor]:
    layers = range(1, model.decoder.num_layers + 1)
    output = model.decoder(
        model.embed(batch), batch.position_ids, layers, visual=batch.image_positions, grids=batch.image_grids
    )
    return dict(output.taps)


def _targets(teacher: Teacher, batch: Batch) -> VisualTokens:
    given = batch.prepared.get(NAME) or batch.teacher_images.get(NAME)
    assert given is not None
    return teacher.targets(given)


@torch.no_grad()
def _measure(model: VLM, probes: EmbeddingDistillation, teacher: Teacher, batches: Iterator[Batch]) -> ProbeResult:
    score_name = {"depth": "depth order", "segmentation": "mIoU"}.get(teacher.known or "", "")
    cosines: list[Tensor] = []
    counts: list[Tensor] = []
    for batch in batches:
        found = probes.predict(_states(model, batch), batch).float()  # [layers, n, q, w]
        targets = _targets(teacher, batch).features.float().view(found.shape[1:])
        cosines.append(F.cosine_similarity(found.flatten(2), targets.flatten(1)[None], dim=-1))
        if teacher.known == "depth":
            things = batch.prepared[OTHER].features.view(*targets.shape[:2], -1)[..., 0] < 0.5
            counts.append(_right_orders(_depth(found), _depth(targets), things))
        elif teacher.known:
            counts.append(_overlaps(found[..., SHAPE_SHARES].argmax(-1), targets[..., SHAPE_SHARES].argmax(-1)))
    if not cosines:
        raise ValueError("lit-vlm probe: no held-out picture can be read")
    score = []
    if counts:
        both = torch.stack(counts).sum(0).double()  # [layers, classes, 2]: numerator and denominator of the score
        score = (both[..., 0] / both[..., 1].clamp(min=1)).mean(1).tolist()
    return ProbeResult(torch.cat(cosines, dim=1).mean(1).tolist(), score, score_name)


def _depth(shares: Tensor) -> Tensor:
    """Mean range of depth of each cell, from shares `[..., ranges]` that may be a little below zero."""
    shares = shares.clamp(min=0)
    ranges = torch.arange(shares.shape[-1], device=shares.device)
    return (shares * ranges).sum(-1) / shares.sum(-1).clamp(min=1e-6)


def _right_orders(found: Tensor, targets: Tensor, things: Tensor) -> Tensor:
    """Pairs of cells in the right order of depth, and all pairs: `[layers, 1, 2]`.

    A pair is two cells of one picture that show things and differ in depth.

    Args:
        found: predicted depth of each cell, `[layers, n, q]`.
        targets: true depth of each cell, `[n, q]`.
        things: whether a cell shows a thing, `[n, q]`.
    """
    apart = targets[:, :, None] - targets[:, None]
    pairs = (apart > DEPTH_MARGIN) & things[:, :, None] & things[:, None]
    right = ((found[..., :, None] > found[..., None, :]) & pairs).sum((1, 2, 3))
    return torch.stack([right, pairs.sum().expand_as(right)], dim=-1)[:, None]


def _overlaps(found: Tensor, targets: Tensor) -> Tensor:
    """Cells in intersection and union of prediction and target, for background and shapes: `[layers, classes, 2]`."""
    classes = torch.arange(SHAPE_SHARES.stop, device=found.device)[:, None, None, None]
    own, other = found == classes, (targets == classes[:, 0])[:, None]
    pair = torch.stack([(own & other).sum((2, 3)), (own | other).sum((2, 3))], dim=-1)
    return pair.transpose(0, 1)


def draw(results: Mapping[str, ProbeResult], title: str, file: Path) -> None:
    """Draw a curve over layers for each model into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {result.score_name for result in results.values() if result.score}
    size = (4.6 * (1 + len(names)) + 1.6, 3.6)
    figure, axes = pyplot.subplots(1, 1 + len(names), figsize=size, squeeze=False, layout="constrained")
    for label, result in results.items():
        layers = range(1, len(result.cosine) + 1)
        for axis, values in zip(axes.flat, (result.cosine, result.score), strict=False):
            axis.plot(layers, values, marker="o", markersize=3, label=label)
    for axis, name in zip(axes.flat, ("cosine with the target", *names), strict=True):
        axis.set_xlabel("decoder layer")
        axis.set_ylabel(name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
