"""Small pretrained parts that know generated scenes, for the scale `mini`.

They are trained on this machine when they are first asked for, which takes about ten minutes on two cores, and are then
kept in the cache. `made:scenes-decoder` has read the language of scenes. `made:scenes-encoder` sees what stands where,
how large it is and how far away, and `made:scenes-classes-encoder` where something stands, its shape and its colour.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_vlm.core.cache import held
from lit_vlm.core.children import PARENT, die_with_parent
from lit_vlm.core.muon import Muon
from lit_vlm.core.precision import choose
from lit_vlm.data.sample.templates import Span, VicunaV1
from lit_vlm.worlds.scenes import Scene, Scenes, render, sample_scene
from lit_vlm.worlds.scenes.world import COLOURS, SHAPES, SIZES

PARTS = {"scenes-decoder": 4, "scenes-encoder": 1, "scenes-classes-encoder": 1}
"""Names of the parts, each with a version that goes up whenever its training gives other weights."""
DECODER = LlamaConfig(
    vocab_size=600,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
"""A decoder of 3.1 million parameters. Six layers, as a comparison takes several: find two things, read, weigh them."""
MAX_THINGS, TURNS = 3, 6
ENCODER, LEVEL, SIZE = "resnet10t", 3, 96
"""Name of a timm model of 1.2 million parameters, the feature level that is read (16 × 16 pixels per token), and the
picture's side in pixels: 36 tokens a picture."""
ANSWERS = re.compile(r"(?:Answer:|ASSISTANT:)(.*?(?:\n|</s>|(?= USER:)|$))")
REST = 0.1
"""Loss weight of text outside the answers, which have 1: most of it, such as a list of things, cannot be predicted."""


def made(name: str, cache: Path, weights: bool = True) -> Path:
    """The path of a pretrained part; it is trained first if the cache does not hold it.

    Args:
        name: one of `PARTS`.
        cache: folder that keeps the parts.
        weights: whether the decoder's weights are needed; without them its configuration and tokenizer are made in
            seconds.

    Returns:
        the decoder's folder as transformers saves it, or the encoder's weight file.

    Raises:
        ValueError: for an unknown name.
        subprocess.CalledProcessError: when the process that trains the part fails.
    """
    if name not in PARTS:
        raise ValueError(f"there is no part 'made:{name}'; there are {', '.join(f'made:{part}' for part in PARTS)}")
    target = cache / f"{name}-{PARTS[name]}"
    target.mkdir(exist_ok=True)
    wanted = target / ("config.json" if name == "scenes-decoder" and not weights else "model.safetensors")
    if wanted.exists():
        return target if name == "scenes-decoder" else wanted
    goal = "weights" if weights else "config"
    # A lease for each goal: who needs the configuration alone does not wait for a training.
    with held(cache / f"{name}-{goal}.lease", f"makes made:{name}"):
        if not wanted.exists():
            # A process of its own: the caller may have set another dtype, device or thread count.
            words = [sys.executable, "-m", "lit_vlm.worlds.mini", name, goal]
            environment = {**os.environ, PARENT: str(os.getpid())}
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                subprocess.run([*words, scratch], env=environment, check=True)
                # What is looked for comes last: whoever sees it finds the others, wherever this process is stopped.
                last = ("config.json", "model.safetensors")
                for file in sorted(Path(scratch).iterdir(), key=lambda file: (file.name in last, file.name)):
                    file.replace(target / file.name)
    return target if name == "scenes-decoder" else wanted


# ------------------------------------------------------------------ decoder


def _texts(count: int, seed: int) -> Iterator[str]:
    """Conversations, documents and captions about scenes, without pictures."""
    template = VicunaV1(system="")
    texts = Scenes("text", count, seed=seed, turns=TURNS, max_things=MAX_THINGS, wording="plain")
    captions = Scenes("captions", count, seed=seed, max_things=MAX_THINGS, wording="plain")
    for index in range(count):
        pieces = template.render(texts.outline(index).messages, "</s>")
        yield "".join(piece.text for piece in pieces if isinstance(piece, Span))
        if index % 3 == 0:
            yield f"{captions.outline(index).messages[-1].text}\n</s>"


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Learn the decoder's tokenizer from the scenes' text; save it, and the decoder's configuration, in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DECODER.vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(600, 900), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    DECODER.save_pretrained(folder)
    return fast


def train_decoder(folder: Path, steps: int = 600, rows: int = 12, length: int = 192, documents: int = 10000) -> None:
    """Train the decoder on the scenes' text and save it with its tokenizer; in the loss, answers weigh most.

    Args:
        folder: where both are saved.
        steps: optimizer steps.
        rows: rows of tokens per step.
        length: tokens per row.
        documents: texts that the rows are cut from.
    """
    torch.manual_seed(0)
    ids, weights = _tokens(save_tokenizer(folder), documents, length)
    model = LlamaForCausalLM._from_config(DECODER, attn_implementation="eager")
    order = torch.cat([torch.randperm(len(ids)) for _ in range(1 + steps * rows // len(ids))])

    def loss(step: int) -> Tensor:
        chosen = order[step * rows : (step + 1) * rows]
        logits = model(input_ids=ids[chosen]).logits[:, :-1].float().flatten(0, 1)
        weight = weights[chosen][:, 1:].flatten()
        return (F.cross_entropy(logits, ids[chosen][:, 1:].flatten(), reduction="none") * weight).sum() / weight.sum()

    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(hidden, lr=3e-3, weight_decay=0.01),
        AdamW(others, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.98)),
    ]
    _train(model, optimizers, loss, steps, "training the mini decoder on the scenes' text, once")
    model.eval().save_pretrained(folder)


def _tokens(tokenizer: PreTrainedTokenizerFast, documents: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids of all texts end to end, and the loss weight of each id, cut into rows: `[rows, length]` both."""
    ids: list[int] = []
    weights: list[float] = []
    for text in _texts(documents, 0):
        found = tokenizer(text, return_offsets_mapping=True)
        answers = [match.span(1) for match in ANSWERS.finditer(text)]
        ids += found.input_ids
        weights += [
            1.0 if any(start < right and end > left for left, right in answers) else REST
            for start, end in found.offset_mapping
        ]
    rows = len(ids) // length
    return (
        torch.tensor(ids[: rows * length]).view(rows, length),
        torch.tensor(weights[: rows * length]).view(rows, length),
    )


# ------------------------------------------------------------------ encoder


class _Cells(nn.Module):
    """Predicts for each cell whether a thing's centre is there, the thing's shape, colour and size, depth and place."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(ENCODER, features_only=True, out_indices=(LEVEL,))
        self.sizes = [1, len(SHAPES), len(COLOURS), len(SIZES), 3]
        self.read = nn.Conv2d(self.backbone.feature_info.channels()[-1], sum(self.sizes), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        (features,) = self.backbone(pixels)
        return self.read(features).float().permute(0, 2, 3, 1).split(self.sizes, -1)


def _cell_targets(scenes: list[Scene], side: int) -> tuple[Tensor, Tensor]:
    """1 where a centre is, `[n, side, side]`; shape, colour, size, depth, row, column there, `[n, side, side, 6]`."""
    here, what = torch.zeros(len(scenes), side, side), torch.zeros(len(scenes), side, side, 6)
    for number, scene in enumerate(scenes):
        # Nearest last: where two centres share a cell, the nearer thing overwrites the other.
        for thing in sorted(scene.things, key=lambda thing: -thing.z):
            column, row, depth = scene.camera.project(thing.centre)
            i, j = min(side - 1, int(row * side)), min(side - 1, int(column * side))
            here[number, i, j] = 1
            look = thing.look
            kinds = [SHAPES.index(look.shape), COLOURS.index(look.colour), SIZES.index(look.size)]
            # Place in the whole picture, not in the cell: no later part tells which cell a token is from.
            what[number, i, j] = torch.tensor([*kinds, depth / 3 - 2, row * 4 - 2, column * 4 - 2])
    return here, what


def train_encoder(folder: Path, steps: int = 400, batch: int = 48, classes_only: bool = False) -> None:
    """Train the encoder to name what stands in each cell of a picture, and save its backbone.

    Args:
        folder: where `model.safetensors` is saved.
        steps: optimizer steps.
        batch: pictures per step.
        classes_only: shape and colour alone are asked of it, and not size, depth and place, as of an encoder that
            learnt from names of what is in pictures.
    """
    torch.manual_seed(0)
    model = _Cells().to(memory_format=torch.channels_last)
    config = timm.get_pretrained_cfg(ENCODER)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def loss(step: int) -> Tensor:
        scenes = [sample_scene(f"mini-{step}-{index}") for index in range(batch)]
        pixels = torch.from_numpy(np.stack([render(scene, SIZE).image for scene in scenes])).permute(0, 3, 1, 2)
        found = model(((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last))
        here, what = _cell_targets(scenes, found[0].shape[1])
        places = here > 0
        total = F.binary_cross_entropy_with_logits(found[0][..., 0], here, pos_weight=torch.tensor(4.0))
        for column, logits in enumerate(found[1 : 3 if classes_only else 4]):
            total = total + F.cross_entropy(logits[places], what[places][:, column].long())
        if classes_only:
            return total
        return total + 4 * F.smooth_l1_loss(found[4][places], what[places][:, 3:])

    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    what_of = "what is in scenes" if classes_only else "scenes"
    _train(model, [optimizer], loss, steps, f"training the mini encoder on {what_of}, once")
    state = {name: tensor.contiguous() for name, tensor in model.backbone.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def _train(
    model: nn.Module, optimizers: list[Optimizer], loss: Callable[[int], Tensor], steps: int, title: str
) -> None:
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.defaults["lr"], total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
        )
        for o in optimizers
    ]
    model.train()
    precision = choose("cpu")
    with Progress() as progress:
        task = progress.add_task(title, total=steps)
        for step in range(steps):
            with precision.autocast("cpu"):
                value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            progress.update(task, advance=1, description=f"{title} (loss {value.item():.2f})")


if __name__ == "__main__":
    die_with_parent()
    part, goal, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if part != "scenes-decoder":
        train_encoder(out, classes_only=part == "scenes-classes-encoder")
    elif goal == "weights":
        train_decoder(out)
    else:
        save_tokenizer(out)
