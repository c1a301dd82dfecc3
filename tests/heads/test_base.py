"""What all heads have in common: targets that fit, the zero of a batch without images, the sum and its count."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, Images, PixelSpec, VisualTokens
from lit_vlm.heads import Head
from lit_vlm.heads.base import counted
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import Teacher
from tests.tiny import batch_of, tiny_vlm


class Means(Teacher):
    """The mean of each picture, in bf16 and with a graph, which the kit takes away."""

    width = 1
    pixels = PixelSpec(28, 7, (0.5, 0.5, 0.5))

    def __init__(self, wide: int = 1) -> None:
        self.wide = wide
        self.weight = torch.ones(wide, requires_grad=True)

    def __call__(self, images: Images) -> VisualTokens:
        means = images.pixels.view(len(images), -1).float().mean(1, keepdim=True) * self.weight
        return VisualTokens(means.bfloat16(), (Grid(1, 1),) * len(images))

    def identity(self) -> str:
        return "means"


class Level(Head):
    """The second layer's mean against the teacher's, through weights that images pass and text does not."""

    taps = (2,)

    def __init__(self, width: int, num_layers: int, wide: int = 1, wrong: Any = None) -> None:
        super().__init__(width, num_layers)
        self.teacher = Means(wide)
        self.scale = nn.Parameter(torch.ones(3, 1))
        self.wrong = wrong
        self.seen: list[VisualTokens] = []

    def loss(self, states: Any, batch: Batch, targets: VisualTokens) -> Tensor:
        self.seen.append(targets)
        assert states.keys() == {2}  # what other heads read is none of its business
        if self.wrong is not None:
            return self.wrong
        return self.scale.sum() * (states[2].float().mean() - targets.features).square().sum()


def model_with(**settings: Any) -> VLM:
    return tiny_vlm(heads={"level": partial(Level, **settings)})


def seen_batch(model: VLM, **changes: Any) -> Batch:
    batch = batch_of(model)
    batch.teacher_images["level"] = batch.images
    return batch


def test_targets_come_in_fp32_without_a_graph_one_for_each_image() -> None:
    model = model_with()
    batch = seen_batch(model)
    model(batch, {"level": 1.0})["level"].backward()
    head = model.heads["level"]
    assert isinstance(head, Level)
    (targets,) = head.seen
    assert (targets.features.dtype, targets.features.requires_grad) == (torch.float32, False)
    assert len(targets.grids) == len(batch.image_grids)
    batch.prepared["level"] = VisualTokens(targets.features.half(), targets.grids)
    model(batch, {"level": 1.0})
    assert torch.equal(head.seen[1].features, targets.features.half().float())


def test_a_batch_without_images_is_a_zero_that_every_weight_and_state_takes_part_in() -> None:
    model = model_with()
    batch = seen_batch(model).text_only(torch.ones(1, 4).long(), torch.arange(4)[None])
    loss = model(batch, {"level": 1.0})["level"]
    loss.backward()
    head = model.heads["level"]
    assert isinstance(head, Level)
    assert loss == 0
    assert not head.seen
    block = model.decoder.blocks()
    used = [*head.parameters(), *next(iter(block)).parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in used)


@pytest.mark.parametrize(
    ("settings", "drop", "message"),
    [
        ({}, 1, r"model.heads.level: Level: its teacher Means gives targets of 3 images, 1 wide; expected .* 4 images"),
        ({"wide": 2}, 0, r"gives targets of 4 images, 2 wide; expected those of the batch's 4 images, 1 wide"),
        ({}, 4, r"brings neither its images \(Batch.teacher_images\) nor its features \(Batch.prepared\)"),
        (
            {"wrong": torch.ones(2)},
            0,
            r"returned torch.float32 \(2,\) and must return a sum, one fp32 number",
        ),
        ({"wrong": (torch.ones(()), 3)}, 0, r"Level.loss returned tuple and must return a sum.*`normaliser`"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], drop: int, message: str) -> None:
    model = model_with(**settings)
    batch = seen_batch(model)
    images = batch.images
    assert len(images) == 4
    batch.teacher_images["level"] = Images(images.pixels[drop * len(images.pixels) // 4 :], images.sizes[drop:])
    if drop == 4:
        del batch.teacher_images["level"]
    with pytest.raises(ValueError, match=message):
        model(batch, {"level": 1.0})


def test_a_count_is_a_number_from_0_up() -> None:
    batch = batch_of(tiny_vlm())
    assert counted("images", batch) == 4
    assert counted(lambda batch: batch.counts.images / 8, batch) == 0.5
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"divided by is {wrong}; it must be a number from 0 up"):
            counted(lambda _, wrong=wrong: wrong, batch)


def test_heads_name_no_blocks() -> None:
    assert model_with().heads["level"].blocks() == ()  # type: ignore[operator]
