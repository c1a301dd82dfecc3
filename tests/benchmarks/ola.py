"""OLA-VLM's pre-training: teachers in the step or prepared, batched or one picture at a time; memory of the contrast.

Runs alternate, and the ratio of each pair is taken, as the speed of a shared machine changes from minute to minute.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lit_vlm.core.batch import Batch, Images, VisualTokens
from lit_vlm.core.losses import contrastive_loss
from lit_vlm.data.sample.collate import collate
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import CLIPEmbedding, DepthAnything, HFEncoder, OneFormerSwin
from lit_vlm.heads import EmbeddingDistillation, Head
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import EncoderTeacher, Teacher
from tests.benchmarks.measure import PRECISION, added_mib, ratios, show
from tests.tiny import tiny_slots

PICTURES, RANKS, ROWS = 8, 2, 4
DECODER = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 8,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 4, "image_size": 168, "patch_size": 14,
}  # fmt: skip
DINO = {
    "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "image_size": 168, "patch_size": 14,
    "out_indices": [2, 4, 6, 8],
}  # fmt: skip
SWIN = {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 6, "image_size": 384}
LOSSES = {"next_token": 1.0, "depth": 0.5, "seg": 0.5, "gen": 0.5}
TARGETS = 884_736
"""Numbers of a published segmentation target: 24 × 24 × 1,536."""


def small() -> VLM:
    """The recipe's parts at a thirtieth of the width, with 144 targets for depth and seg; random weights."""
    head = partial(EmbeddingDistillation, layers=[3, 8], num_targets=144)
    heads = {
        "depth": partial(
            head, teacher=partial(EncoderTeacher, partial(DepthAnything, None, DINO, 168)), tokens="depth"
        ),
        "seg": partial(
            head, teacher=partial(EncoderTeacher, partial(OneFormerSwin, None, SWIN, 384, None)), tokens="seg"
        ),
        "gen": partial(
            head,
            teacher=partial(EncoderTeacher, partial(CLIPEmbedding, None, {**CLIP, "projection_dim": 256})),
            tokens="gen",
            queries="states",
            num_targets=1,
        ),
    }
    slots = tiny_slots(
        encoder=partial(HFEncoder, config=CLIP),
        embedder=partial(Splice, task_tokens={"gen": 8, "depth": 8, "seg": 8}, pooled_from={"depth": 144, "seg": 144}),
        decoder=partial(HFDecoder, config={"model_type": "llama", **DECODER}, tokenizer="bytes"),
        heads=heads,
    )
    model = build(slots)
    model.encoder.requires_grad_(False)
    model.decoder.requires_grad_(False)
    return model


def teachers_of(model: VLM) -> dict[str, Teacher]:
    """By the name of the head."""
    heads = {name: head for name, head in model.heads.items() if isinstance(head, Head)}
    return {name: head.teacher for name, head in heads.items() if head.teacher is not None}


def batch_of(model: VLM) -> Batch:
    """Pictures with 64 tokens of text each, at the size of every reader."""
    grid = model.grid_map(model.encoder.patch_grid(168, 168))
    samples = []
    for number in range(PICTURES):
        text = torch.randint(4, 250, (64,)).tolist()
        ids = [*text[:16], *[0] * grid.num_tokens, *text[16:]]
        image = torch.randint(0, 256, (3, 168, 168), dtype=torch.uint8)
        samples.append(Sample(str(number), "", ids, ids, [16], [grid], [image]))
    batch = collate(samples)
    for name, teacher in teachers_of(model).items():
        side = teacher.pixels.size
        assert side is not None
        batch.teacher_images[name] = Images.pack(
            [torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for _ in range(PICTURES)]
        )
    return batch


def steps() -> dict[str, float]:
    """Time of a forward and backward pass."""
    torch.manual_seed(0)
    model = small().train()
    batch, ready = batch_of(model), batch_of(model)
    teachers = teachers_of(model)
    with PRECISION.autocast("cpu"):
        found = {name: teacher(ready.teacher_images[name]) for name, teacher in teachers.items()}
    ready.prepared = {name: tokens.to(torch.bfloat16) for name, tokens in found.items()}

    def step(given: Batch) -> None:
        with PRECISION.autocast("cpu"):
            losses = model(given, LOSSES)
            sum(LOSSES[name] * value for name, value in losses.items()).backward()  # type: ignore[union-attr]
        model.zero_grad()

    def one_by_one() -> None:
        given = batch_of(model)
        with PRECISION.autocast("cpu"):
            for name, teacher in teachers.items():
                images = batch.teacher_images[name]
                side = images.sizes[0][0]
                tokens = [teacher(Images.pack([one])) for one in images.pixels.view(-1, 3, side, side)]
                features = torch.cat([one.features for one in tokens])
                given.prepared[name] = VisualTokens(features, tuple(one.grids[0] for one in tokens))
        step(given)

    return ratios(
        {
            "prepared targets": lambda: step(ready),
            "teachers in the step, in batches": lambda: step(batch),
            "teachers in the step, one picture at a time": one_by_one,
        }
    )


def _gathered(predictions: torch.Tensor, targets: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """The published way: all targets of all ranks at once, held for the backward pass."""
    whole = [torch.empty_like(targets) for _ in range(dist.get_world_size())]
    dist.all_gather(whole, targets)
    vectors = F.normalize(torch.cat(whole).flatten(1), dim=-1)
    labels = torch.arange(len(targets)) + dist.get_rank() * len(targets)
    losses = [
        F.cross_entropy(F.normalize(one.flatten(1), dim=-1) @ vectors.T * log_scale.exp(), labels, reduction="none")
        for one in predictions
    ]
    return torch.cat(losses)


def _memory(rank: int, ranks: int, kind: str, folder: str, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    predictions = torch.randn(2, ROWS, 576, TARGETS // 576, requires_grad=True)
    targets = torch.randn(ROWS, 576, TARGETS // 576)
    scale = torch.tensor(2.0, requires_grad=True)
    way = contrastive_loss if kind == "one rank at a time" else _gathered
    used = added_mib(lambda: way(predictions, targets, scale).sum().backward())
    if rank == 0:
        queue.put(used)
    dist.destroy_process_group()


def contrast(ranks: int) -> dict[str, float]:
    """Peak memory of rank 0 over what predictions and targets take."""
    found = {}
    context = multiprocessing.get_context("spawn")
    for kind in ("one rank at a time", "all targets gathered"):
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=_memory, args=(rank, ranks, kind, folder, queue)) for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            found[kind] = queue.get()
            for process in processes:
                process.join()
    return found


def main() -> None:
    """Print the tables."""
    show(f"OLA-VLM, PT: forward and backward, {PICTURES} pictures, small parts, {PRECISION.name}", "time", steps())
    used = {f"{ranks} ranks, {kind}": mib for ranks in (2, 6) for kind, mib in contrast(ranks).items()}
    title = f"contrastive loss, {ROWS} pictures per rank, {TARGETS:,} numbers each, two layers, fp32"
    show(title, "peak MiB on one rank", used, 0)
