"""Contract tests of heads and teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_vlm.core.batch import Batch, Images, VisualTokens, patches_alone
from lit_vlm.data.sample.collate import collate
from lit_vlm.heads import Head
from lit_vlm.heads.base import counted
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import Teacher
from lit_vlm.testing.rules import all_train, broken, built, near, pickled
from lit_vlm.testing.tiny import Size, random_images, samples_for, tiny_slots

NAME = "own"


def check_head(
    factory: Callable[[int, int], Head],
    slots: Mapping[str, Any] | None = None,
    sizes: Sequence[Size] = ((28, 28), (28, 28)),
    adds_up: bool = True,
) -> None:
    """Check the rules of a head, in a tiny model.

    Args:
        factory: makes the head from the decoder's width and number of blocks.
        slots: factories of other parts that it needs (`tiny_slots`), such as an embedder with task tokens.
        sizes: (height, width) in pixels of pictures that the encoder takes.
        adds_up: whether the loss of a batch is the sum over its samples; not where images are compared with each other.

    Raises:
        AssertionError: naming the rule that the head breaks.
    """
    model = build(tiny_slots(**dict(slots or {}), heads={NAME: factory})).eval()
    head = model.heads[NAME]
    assert isinstance(head, Head)
    built(lambda: factory(model.decoder.width, model.decoder.num_layers), Head)
    normaliser = head.normaliser if isinstance(head.normaliser, str) else pickled(head, "normaliser", head.normaliser)
    seen, text = samples_for(model, sizes)
    losses = {NAME: 1.0}
    batch = collate([*seen, *text])
    try:
        loss = model(batch, losses)[NAME]
    except ValueError as error:
        raise AssertionError(str(error)) from error
    if not loss.isfinite():
        broken(head, f"its loss is {float(loss)}", "A loss is a number")
    all_train(head, loss, "from a batch with images")
    all_train(head, model(collate(text), losses)[NAME], "from a batch without images")
    each = [collate([sample]) for sample in (*seen, *text)]
    if adds_up:
        with torch.no_grad():
            total = torch.stack([model(one, losses)[NAME] for one in each]).sum()
        near(head, loss.detach(), total, "the loss of a batch is not the sum over its samples",
             "A head returns a sum, and the kit divides it")  # fmt: skip
    if abs(sum(counted(normaliser, one) for one in each) - counted(normaliser, batch)) > 1e-6:
        broken(head, "its count of a batch is not the sum over its samples", "Counts of micro-batches are added up")
    _check_predictions(model, head, batch)
    if head.teacher is not None and head.teacher.known is None:
        with torch.no_grad():
            batch.prepared[NAME] = head.teacher.targets(batch.teacher_images.pop(NAME))
            near(head, model(batch, losses)[NAME], loss.detach(), "prepared targets give another loss",
                 "Targets are read from a cache or computed, with the same numbers")  # fmt: skip


def _check_predictions(model: VLM, head: Head, batch: Batch) -> None:
    """What a head predicts lies on the patches of each image of a batch."""
    rule = "Predictions are features of patches alone, in fp32, with a grid for each image"
    for place, found in model.predictions(batch).get(NAME, {}).items():
        if len(found.grids) != len(batch.image_grids) or found.grids != patches_alone(found.grids):
            broken(head, f"its predictions of {place} have the grids {found.grids}", rule)
        if len(found.features) != sum(grid.num_tokens for grid in found.grids) or found.features.dtype != torch.float32:
            broken(head, f"its predictions of {place} are {found.features.dtype} {tuple(found.features.shape)}", rule)


def check_teacher(factory: Callable[[], Teacher], sizes: Sequence[Size] | None = None) -> None:
    """Check the rules of a teacher.

    Args:
        factory: makes a tiny teacher.
        sizes: (height, width) in pixels of pictures that it takes; default: several where it takes any size, and its
            square where it takes one.

    Raises:
        AssertionError: naming the rule that the teacher breaks.
    """
    teacher = factory()
    if isinstance(teacher, nn.Module):
        broken(teacher, "is an nn.Module", "A head that holds one would save, shard and train it")
    pickled(teacher, "pixels", teacher.pixels)
    if not isinstance(teacher.identity(), str) or teacher.identity() != factory().identity():
        broken(teacher, "identity() differs between two alike", "Prepared features are recognised by it")
    teacher.find_pretrained()
    teacher.load()
    if teacher.known is not None:
        return  # its targets come with the picture
    side, step = teacher.pixels.size, teacher.pixels.multiple
    taken = list(sizes or ([(side, side)] * 3 if side else [(step, 2 * step), (2 * step, step), (step, step)]))
    images = random_images(taken)
    tokens = teacher(images)
    if len(tokens.grids) != len(taken) or tokens.features.shape[-1] != teacher.width:
        broken(teacher, f"gives {len(tokens.grids)} grids and {tokens.features.shape[-1]} features of {len(taken)} "
               f"pictures, width is {teacher.width}", "One grid for each picture, in order, `[t, width]`")  # fmt: skip
    if teacher.targets(images).features.requires_grad:
        broken(teacher, "its targets have a graph", "Targets are constants")
    parts = tokens.features.split([grid.num_tokens for grid in tokens.grids])
    pixels = images.pixels.split([3 * height * width for height, width in taken])
    for index in range(len(taken)):
        alone: VisualTokens = teacher(Images(pixels[index], (images.sizes[index],)))
        near(teacher, parts[index], alone.features, f"picture {index} is another in company, or out of order",
             "Features come in the order of the pictures, and depend on their own alone")  # fmt: skip
    again = factory()
    again.load()
    near(teacher, again(images).features, tokens.features, "two alike give different features",
         "Random weights are the same on every process: seed them")  # fmt: skip
