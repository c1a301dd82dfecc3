"""PatchAlignment: equal to the published layer; pooled, shifted and single-layer variants; images without a match."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_vlm.core.batch import Grid, Images, PixelSpec, VisualTokens
from lit_vlm.heads import PatchAlignment
from lit_vlm.teachers import EncoderTeacher, HFVision, Teacher
from tests.tiny import CLIP, ROOT


class Given(Teacher):
    """Nothing is computed: tests hand the features over as prepared ones."""

    def __init__(self, width: int) -> None:
        self.width, self.pixels = width, PixelSpec(48, 4, (0.5, 0.5, 0.5))

    def __call__(self, images: Images) -> VisualTokens:
        raise AssertionError("the features are given")

    def identity(self) -> str:
        return "given"


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return torch.load(ROOT / "tests" / "fixtures" / "eve.pt", weights_only=True)


def on_square(target: Tensor, rows: int, cols: int, side: int) -> Tensor:
    """A picture's features in the middle of a square whose other features count for nothing."""
    square = torch.full((side, side, target.shape[-1]), 1e3, dtype=target.dtype)
    top, left = (side - rows) // 2, (side - cols) // 2
    square[top : top + rows, left : left + cols] = target.view(rows, cols, -1)
    return square.flatten(0, 1)


def run(published: dict[str, Any], dtype: torch.dtype, batch: list[int]) -> tuple[Tensor, PatchAlignment, Tensor]:
    """The loss of some of the published images, in a row each, behind as many other positions as its number."""
    pal = published["pal"]
    head = PatchAlignment(48, 8, partial(Given, 40), every=4)
    head.load_state_dict(pal["state_dict"])
    head.to(dtype)
    shapes = [published["patch_hw"][i] for i in batch]
    grids = tuple(Grid(rows, cols, 1, 1) for rows, cols in shapes)
    length = max(grid.num_tokens for grid in grids) + len(batch)
    hidden = torch.full((len(batch), length, 3, 48), 7.0, dtype=dtype)
    positions = []
    for row, (image, grid) in enumerate(zip(batch, grids, strict=True)):
        hidden[row, row : row + grid.num_tokens] = pal["hidden"][image].to(dtype)
        positions.append(torch.arange(grid.num_tokens) + row * length + row)
    hidden.requires_grad_()
    features = torch.cat(
        [on_square(pal["target"][i].to(dtype), *shape, 12) for i, shape in zip(batch, shapes, strict=True)]
    )
    # Prepared features are read in fp32; the test of fp64 takes the pieces apart.
    teacher = VisualTokens(features, tuple(Grid(12, 12) for _ in batch))
    where = SimpleNamespace(image_grids=grids, image_positions=torch.cat(positions))
    states = {8: hidden[:, :, 0], 4: hidden[:, :, 1], 0: hidden[:, :, 2]}
    return head(states, where, teacher), head, hidden  # type: ignore[arg-type]


def test_taps_count_down_from_the_last_layer() -> None:
    assert PatchAlignment(8, 32, partial(Given, 8)).layers == (32, 28, 24, 20, 16, 12, 8, 4, 0)
    assert PatchAlignment(8, 30, partial(Given, 8), every=8).taps == (6, 14, 22, 30)
    assert PatchAlignment(8, 30, partial(Given, 8), every=None).taps == (30,)


def test_loss_and_gradients_equal_the_published_ones(published: dict[str, Any]) -> None:
    loss, head, hidden = run(published, torch.float32, [0, 1, 2, 3])
    pal = published["pal"]
    torch.testing.assert_close(loss / 4, pal["loss"], atol=1e-5, rtol=1e-5)
    (loss / 4).backward()
    for name, parameter in head.named_parameters():
        compare(parameter.grad, pal["grads"][name])
    assert hidden.grad is not None
    for row, expected in enumerate(pal["grad_hidden"]):
        compare(hidden.grad[row, row : row + len(expected)], expected)


def compare(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_students_equal_the_published_ones_in_double_precision(published: dict[str, Any]) -> None:
    pal = published["pal"]
    head = PatchAlignment(48, 8, partial(Given, 40), every=4)
    head.load_state_dict(pal["state_dict"])
    head.double()
    losses = []
    for image, (rows, cols) in enumerate(published["patch_hw"][:4]):
        hidden = pal["hidden"][image].double()[1:].view(rows, cols + 1, 3, 48)[:, :-1].flatten(0, 1)
        student = head.student(hidden.unbind(1))
        torch.testing.assert_close(student, pal["student_f64"][image], atol=1e-12, rtol=1e-12)
        losses.append((1 - F.cosine_similarity(student, pal["target"][image].double(), dim=-1)).mean())
    torch.testing.assert_close(torch.stack(losses).mean(), pal["loss_f64"], atol=1e-6, rtol=1e-6)


def test_an_image_counts_the_same_in_any_company(published: dict[str, Any]) -> None:
    alone = sum(run(published, torch.float32, [image])[0].item() for image in (3, 1, 3))
    torch.testing.assert_close(run(published, torch.float32, [3, 1, 3])[0].item(), alone)


def small(every: int | None = 1, target: Any = "same") -> PatchAlignment:
    torch.manual_seed(0)
    return PatchAlignment(8, 2, partial(Given, 8), every=every, num_heads=2, target=target)


def case(head: PatchAlignment, shapes: list[tuple[int, int]], side: int) -> tuple[dict[int, Tensor], Any, VisualTokens]:
    generator = torch.Generator().manual_seed(1)
    grids = tuple(Grid(rows, cols, 1, 1) for rows, cols in shapes)
    total = sum(grid.num_tokens for grid in grids)
    states = {layer: torch.randn(1, total, 8, generator=generator) for layer in head.taps}
    features = torch.randn(len(shapes) * side * side, 8, generator=generator)
    where = SimpleNamespace(image_grids=grids, image_positions=torch.arange(total))
    return states, where, VisualTokens(features, tuple(Grid(side, side) for _ in shapes))


def by_hand(head: PatchAlignment, states: dict[int, Tensor], where: Any, teacher: VisualTokens, ratio: int) -> Tensor:
    """Image by image, with loops, pooling by torch."""
    total, start = torch.zeros(()), 0
    for number, grid in enumerate(where.image_grids):
        rows, cols = grid.rows // ratio, grid.cols // ratio
        read = []
        for layer in head.layers:
            block = states[layer][0, start + 1 : start + grid.num_tokens].view(grid.rows, grid.cols + 1, 8)[:, :-1]
            pooled = F.avg_pool2d(block.permute(2, 0, 1)[None], ratio)[0]
            read.append(pooled.flatten(1).T)
        side = teacher.grids[number].rows
        square = teacher.features[number * side * side : (number + 1) * side * side].view(side, side, 8)
        top, left = (side - rows) // 2, (side - cols) // 2
        target = square[top : top + rows, left : left + cols].reshape(-1, 8)
        student = head.student(read)
        if head.target == "next":
            student, target = student[:-1], target[1:]
        total = total + (1 - F.cosine_similarity(student, target, dim=-1)).mean()
        start += grid.num_tokens
    return total


@pytest.mark.parametrize("every", [1, 2, None])
@pytest.mark.parametrize("target", ["same", "next"])
@pytest.mark.parametrize(
    ("shapes", "ratio"), [([(2, 4), (4, 4), (4, 3)], 1), ([(4, 8), (8, 8), (8, 2)], 2), ([(8, 6)], 2)]
)
def test_any_mix_of_images_equals_one_by_one(
    every: int | None, target: str, shapes: list[tuple[int, int]], ratio: int
) -> None:
    head = small(every, target)
    states, where, teacher = case(head, shapes, side=4)
    found = head(states, where, teacher)
    torch.testing.assert_close(found, by_hand(head, states, where, teacher, ratio))
    found.backward()
    # With two layers there is one key, whose weight is 1 whatever the query: the query learns nothing.
    idle = "norm_layer.0" if every == 2 else "-"
    assert all(p.grad is not None and p.grad.any() for n, p in head.named_parameters() if not n.startswith(idle))


def test_a_batch_without_images_uses_every_parameter_and_changes_none() -> None:
    head = small()
    states, _, _ = case(head, [(4, 4)], side=4)
    loss = head(states, SimpleNamespace(image_grids=()), None)  # type: ignore[arg-type]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("shape", [(3, 3), (6, 4), (8, 3)])
def test_grids_that_do_not_fit_say_which_transform_does(shape: tuple[int, int]) -> None:
    head = small()
    states, where, teacher = case(head, [shape], side=4)
    with pytest.raises(ValueError, match="AspectGrid"):
        head(states, where, teacher)


def test_settings_out_of_range_name_the_setting() -> None:
    with pytest.raises(ValueError, match="num_heads 3"):
        PatchAlignment(8, 2, partial(Given, 8), num_heads=3)
    with pytest.raises(ValueError, match="every is 0"):
        PatchAlignment(8, 2, partial(Given, 8), every=0)


def test_the_teacher_is_the_encoder_read_before_its_last_block() -> None:
    teacher = HFVision(None, CLIP)
    assert isinstance(teacher, EncoderTeacher)
    assert (teacher.width, teacher.pixels.size) == (32, 28)
    assert len(teacher.encoder.blocks()) == CLIP["num_hidden_layers"] - 1  # type: ignore[arg-type]
    picture = Images.pack([torch.zeros(3, 28, 28, dtype=torch.uint8)])
    assert teacher(picture).grids == (Grid(4, 4),)
