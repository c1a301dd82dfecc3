"""HoVLE's first stage: with the teacher, with prepared features, and with the decoder that it leaves out.

Runs alternate, and the ratio of each pair is taken, as the speed of a shared machine changes from minute to minute.
"""

from __future__ import annotations

from functools import partial

import torch
from rich.console import Console

from lit_vlm.core.batch import Batch, Images, VisualTokens
from lit_vlm.data.sample.collate import collate
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import AbsentDecoder, HFDecoder
from lit_vlm.embedders import Holistic
from lit_vlm.encoders import ConvPatches, TimmEncoder
from lit_vlm.heads import HolisticDistillation, WordDistillation
from lit_vlm.model.build import Slots, build, build_on_meta
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import PatchMerge
from lit_vlm.teachers import EncoderTeacher
from tests.benchmarks.measure import PRECISION, ratios, show

SMALL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
FULL = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 92553, "tie_word_embeddings": False,
}  # fmt: skip
LOSSES = {"image": 1.0, "text": 1.0}


def small() -> VLM:
    """SmolLM2-135M's shapes, four layers in front of it, and an EfficientNet as the teacher; random weights."""
    teacher = partial(EncoderTeacher, partial(TimmEncoder, "efficientnet_b0", None))
    heads = {"image": partial(HolisticDistillation, teacher=teacher, ratio=1), "text": WordDistillation}
    slots = Slots(
        encoder=partial(ConvPatches, width=576, image_size=224, patch=16),
        projector=PatchMerge,
        embedder=partial(Holistic, num_layers=4, num_heads=9, num_kv_heads=3, ffn_width=1536),
        decoder=partial(HFDecoder, config=SMALL, tokenizer="bytes"),
        heads=heads,
    )
    return build(slots)


def batch_of(model: VLM, count: int = 8) -> Batch:
    """Pictures with 64 tokens of text each."""
    grid = model.grid_map(model.encoder.patch_grid(224, 224))
    samples = []
    for number in range(count):
        text = torch.randint(4, 49000, (64,)).tolist()
        image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8)
        ids = [*[0] * grid.num_tokens, *text]
        samples.append(Sample(str(number), "", ids, ids, [0], [grid], [image]))
    batch = collate(samples)
    batch.teacher_images = {"image": batch.images}
    return batch


def steps() -> dict[str, float]:
    """Time of a forward and backward pass."""
    torch.manual_seed(0)
    model = small().train()
    batch = batch_of(model)
    teacher = model.heads["image"].teacher
    ready = batch_of(model)
    features: VisualTokens = teacher(Images(batch.images.pixels, batch.images.sizes))  # type: ignore[operator]
    ready.prepared = {"image": features.to(torch.bfloat16)}
    decoder = model.decoder

    def step(given: Batch, losses: dict[str, float]) -> None:
        with PRECISION.autocast("cpu"):
            sum(model(given, losses).values()).backward()  # type: ignore[union-attr]
        model.zero_grad()

    def without(given: Batch) -> None:
        model.decoder = AbsentDecoder(decoder)
        step(given, LOSSES)
        model.decoder = decoder

    return ratios(
        {
            "stage 1, teacher online": lambda: without(batch),
            "stage 1, prepared features": lambda: without(ready),
            "the same, and the next token through the decoder": lambda: step(batch, LOSSES | {"next_token": 1.0}),
        }
    )


def weights() -> tuple[int, int]:
    """Parameters of the published shapes in stage 1, without and with the decoder."""
    slots = Slots(ConvPatches, PatchMerge, Holistic, partial(HFDecoder, config=FULL, tokenizer="bytes"))
    model = build_on_meta(slots)
    whole = sum(parameter.numel() for parameter in model.parameters())
    return whole - sum(parameter.numel() for parameter in model.decoder.parameters()), whole


def main() -> None:
    """Print the table."""
    title = f"HoVLE, stage 1: forward and backward, 8 pictures of 49 tokens with 64 of text, {PRECISION.name}"
    show(title, "time", steps())
    without, whole = weights()
    Console(width=130).print(f"weights on the device, 2b: {without / 1e6:,.0f}M of {whole / 1e6:,.0f}M")
