"""A training step against transformers' LlavaForConditionalGeneration: same weights, same samples, one process.

Runs alternate, and the ratio of each pair is taken, as the speed of a shared machine changes from minute to minute.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from rich.console import Console
from transformers import LlavaConfig, LlavaForConditionalGeneration

from lit_vlm.checkpoints import load_published
from lit_vlm.core.batch import IGNORE, Batch
from lit_vlm.data.sample.collate import collate
from lit_vlm.data.sample.encode import Sample
from lit_vlm.model.vlm import VLM
from lit_vlm.planning.bench.reference import reference_inputs
from tests.benchmarks.measure import PRECISION
from tests.tiny import collate_packed

IMAGE_TOKEN = 31999
CONFIG = {
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 4, "image_size": 112, "patch_size": 14, "projection_dim": 64,
    },
    "text_config": {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "image_token_index": IMAGE_TOKEN,
    "image_seq_length": 64,
}  # fmt: skip
ROUNDS = 5


def samples(lengths: list[int], model: VLM, density: float = 0.2) -> list[Sample]:
    """One picture and text each; the last `density` of the text is the answer, as in LLaVA's instruction data."""
    rng = random.Random(0)
    grid = model.grid_map(model.encoder.patch_grid(112, 112))
    made = []
    for index, length in enumerate(lengths):
        text = [rng.randrange(3, 31000) for _ in range(length)]
        answer = max(1, int(length * density))
        ids = [1, *[0] * grid.num_tokens, *text]
        labels = [IGNORE] * (len(ids) - answer) + text[-answer:]
        image = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8)
        made.append(Sample(str(index), "bench", ids, labels, [1], [grid], [image]))
    return made


def seconds(function: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
    """One forward and backward, in the precision that this machine is fast in."""
    start = time.perf_counter()
    with PRECISION.autocast("cpu"):
        loss = function()
    loss.backward()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return elapsed


def compare(full: bool, mixed: bool, attention: str) -> tuple[float, float, float]:
    """Ratio of tokens per second, unpacked and packed, over the reference; and the reference's share of padding."""
    torch.manual_seed(0)
    reference = LlavaForConditionalGeneration(LlavaConfig(**CONFIG))
    reference.set_attn_implementation(attention)
    model = load_published("llava-hf", reference.state_dict(), CONFIG)
    model.decoder.lm.set_attn_implementation(attention)
    reference.requires_grad_(full)
    model.requires_grad_(full)
    for ours, theirs in (
        (model.encoder, reference.model.vision_tower),
        (model.projector, reference.model.multi_modal_projector),
    ):
        ours.requires_grad_(ours is model.projector)
        theirs.requires_grad_(ours is model.projector)
    reference.train()
    model.train()
    rng = random.Random(1)
    lengths = [min(448, int(rng.lognormvariate(4.2, 0.9)) + 8) for _ in range(16)] if mixed else [192] * 8
    made = samples(lengths, model)
    padded, packed = collate(made), collate_packed(made, capacity=max(len(sample) for sample in made))
    inputs = reference_inputs(model.encoder, padded, IMAGE_TOKEN)

    def step(batch: Batch) -> torch.Tensor:
        return model(batch, {"next_token": 1.0})["next_token"] / len(batch.targets)

    ratios: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        base = seconds(lambda: reference(**inputs).loss, reference)
        ratios[0].append(base / seconds(lambda: step(padded), model))
        ratios[1].append(base / seconds(lambda: step(packed), model))
    # The first round warms up.
    return (
        statistics.median(ratios[0][1:]),
        statistics.median(ratios[1][1:]),
        1 - padded.num_tokens / padded.input_ids.numel(),
    )


def main() -> None:
    """Print a row for each setting as soon as it is measured."""
    console = Console(width=130, highlight=False)
    console.print(
        f"training step in {PRECISION.name}: tokens/s over transformers' LlavaForConditionalGeneration, same weights "
        "and samples"
    )
    for attention, full, mixed in product(("sdpa", "eager"), (False, True), (False, True)):
        unpacked, packed, padding = compare(full, mixed, attention)
        trains = "projector and decoder" if full else "projector only"
        lengths = f"{'mixed' if mixed else 'equal'} lengths ({padding:.0%} padding)"
        console.print(f"{attention:6} {trains:22} {lengths:30} unpacked {unpacked:.2f}×  packed {packed:.2f}×")
