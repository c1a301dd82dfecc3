"""EVE's parts: one batch of mixed sizes against one image at a time; taps; divide-and-conquer against both branches.

Runs alternate, and the ratio of each pair is taken, as the speed of a shared machine changes from minute to minute.
"""

from __future__ import annotations

import multiprocessing
import random
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Images, PixelSpec
from lit_vlm.data import AspectGrid
from lit_vlm.decoders import Decoder, DivideAndConquer, HFDecoder
from lit_vlm.decoders.divide_and_conquer import Routed
from lit_vlm.encoders import EvePatchEmbedding
from tests.benchmarks.measure import PRECISION, added_mib, ratios, show

WIDTH, LAYERS, LENGTH, ROWS = 512, 6, 512, 2
CONFIG = {
    "model_type": "qwen2", "hidden_size": WIDTH, "intermediate_size": 1376, "num_hidden_layers": LAYERS,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000,
}  # fmt: skip
TAPPED = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32}
POSITIONS = 4096


# ------------------------------------------------------------------ patch embedding layer


def pictures(count: int) -> list[Tensor]:
    """Random pixels of random aspect ratios, as EVE's transform leaves them."""
    rng = random.Random(0)
    transform, pixels = AspectGrid(336, 12), PixelSpec(None, 28, (0.5, 0.5, 0.5))
    sizes = [transform.size((rng.randint(200, 640), rng.randint(200, 640)), pixels) for _ in range(count)]
    return [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for width, height in sizes]


def embedding() -> tuple[dict[str, float], int]:
    """One batch, and one image at a time."""
    torch.manual_seed(0)
    encoder = EvePatchEmbedding(width=1024, patch=14)
    images = pictures(16)

    def run(batches: list[list[Tensor]]) -> None:
        with PRECISION.autocast("cpu"):
            for batch in batches:
                encoder(Images.pack(batch)).features.float().sum().backward()
        encoder.zero_grad()

    found = ratios({"one batch": lambda: run([images]), "one image at a time": lambda: run([[one] for one in images])})
    return found, len({image.shape for image in images})


# ------------------------------------------------------------------ divide and conquer


class Both(nn.Module):
    """Both branches for all tokens, blended, as EVEv2's code does it."""

    def __init__(self, routed: Routed, mark: Tensor) -> None:
        super().__init__()
        self.text, self.vision, self.mark = routed.text, routed.vision, mark

    def forward(self, states: Tensor) -> Tensor:
        return self.text(states) * (1 - self.mark) + self.vision(states) * self.mark


def branches() -> dict[str, float]:
    """A step of the plain decoder, of divide-and-conquer, and of both branches."""
    torch.manual_seed(0)
    embeds = torch.randn(ROWS, LENGTH, WIDTH)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    visual = torch.cat([torch.arange(300) + row * LENGTH + 1 for row in range(ROWS)])
    mark = torch.zeros(ROWS * LENGTH).index_fill(0, visual, 1).view(ROWS, LENGTH, 1)
    plain = HFDecoder(config=CONFIG, tokenizer="bytes")
    routed = DivideAndConquer(config=CONFIG, tokenizer="bytes")
    both = DivideAndConquer(config=CONFIG, tokenizer="bytes")
    for block in both.blocks():
        for name, module in list(block.named_modules()):
            if isinstance(module, Routed):
                block.set_submodule(name, Both(module, mark))

    def step(decoder: Decoder, where: Tensor | None) -> None:
        with PRECISION.autocast("cpu"):
            decoder(embeds, positions, visual=where).hidden.float().sum().backward()
        decoder.zero_grad()

    return ratios(
        {
            "plain decoder": lambda: step(plain, None),
            "divide and conquer": lambda: step(routed, visual),
            "both branches": lambda: step(both, None),
        }
    )


# ------------------------------------------------------------------ taps


def memory(kind: str, queue: Any) -> None:
    """MiB of a forward pass with recomputed blocks that hidden states add."""
    torch.manual_seed(0)
    config = CONFIG | TAPPED
    decoder = HFDecoder(config=config, tokenizer="bytes", recompute=True)
    decoder.train()
    embeds = torch.randn(1, POSITIONS, config["hidden_size"], requires_grad=True)  # type: ignore[call-overload]
    positions = torch.arange(POSITIONS)[None]

    def keep() -> object:
        if kind == "none":
            return decoder(embeds, positions)
        if kind == "taps":
            taps = decoder(embeds, positions, taps=tuple(range(0, 33, 4))).taps
            return torch.stack([taps[layer] for layer in range(0, 33, 4)])
        output = decoder.base(inputs_embeds=embeds, position_ids=positions, output_hidden_states=True, use_cache=False)
        return torch.stack(output.hidden_states)  # the published way: one tensor of them all

    queue.put(added_mib(keep))


def taps() -> dict[str, float]:
    """Each in a process of its own."""
    found = {}
    for kind in ("none", "taps", "output_hidden_states"):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=memory, args=(kind, queue))
        process.start()
        found[kind] = queue.get()
        process.join()
    return found


def main() -> None:
    """Print the tables."""
    found, sizes = embedding()
    title = f"patch embedding layer, forward and backward, 16 images of {sizes} sizes, width 1024, {PRECISION.name}"
    show(title, "time", found)
    title = f"decoder step, {ROWS} rows of {LENGTH} positions, 300 of each image tokens, d {WIDTH}, {PRECISION.name}"
    show(title, "time", branches())
    title = f"nine hidden states of 32 layers kept, {POSITIONS} positions, d {TAPPED['hidden_size']}, fp32"
    show(title, "peak MiB of the forward pass", taps(), 0)
