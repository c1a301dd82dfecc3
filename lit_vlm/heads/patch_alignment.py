"""The patch aligning layer (PAL) of EVE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lit_vlm.core.batch import Batch, Grid, Patches, VisualTokens, index_patches, patches_alone
from lit_vlm.core.flops import Flops, FlopsOf, Weights, attention
from lit_vlm.core.losses import cosine_distance
from lit_vlm.core.transfer import send
from lit_vlm.heads.base import Head, Tap, at_patches
from lit_vlm.teachers.base import Teacher


class PatchAlignment(Head):
    """Pull what the decoder knows of each patch towards the features of a frozen vision model (EVE, section 3.2).

    Several layers are read at the patches, CLS and row ends left out. Per patch, the state of the last layer looks at
    those of the other layers by cross-attention (CA3; the scale is width^-½ although there are several heads, as
    published), and the result is compared with the teacher's feature of the same place. The loss is one minus the
    cosine, averaged over the patches of an image, then over images.

    Where an image has more tokens per side than the teacher (a high resolution), states are averaged over windows.

    Args:
        width: width of the decoder.
        num_layers: blocks of the decoder.
        teacher: gives the targets, on a square with the picture in the middle; see `data.AspectGrid`.
        every: read the last layer and every so many below it, down to the input vectors; null reads the last alone.
        num_heads: attention heads.
        target: the teacher's patch that is compared: of the `same` place, or the `next` one in reading order.

    Raises:
        ValueError: when `num_heads` does not divide the teacher's width, or `every` is below 1.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        teacher: Callable[[], Teacher],
        every: int | None = 4,
        num_heads: int = 8,
        target: Literal["same", "next"] = "same",
    ) -> None:
        super().__init__(width, num_layers)
        self.teacher = teacher()
        out = self.teacher.width
        if out % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the teacher's width {out}")
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; it must be at least 1, or null for the last layer alone")
        self.layers = tuple(range(num_layers, -1, -every)) if every else (num_layers,)
        self.taps = tuple(sorted(self.layers))
        self.num_heads, self.target, self.every = num_heads, target, every
        self._ratio = 1  # image tokens per patch of the teacher, along a side, in the last batch with images
        self.input_layer = nn.Linear(width, out)
        if len(self.layers) > 1:
            self.norm_layer = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out, bias=False)) for _ in self.layers
            )
            self.output_layer = nn.Linear(out, out)

    def loss(self, states: Mapping[Tap, Tensor], batch: Batch, targets: VisualTokens) -> Tensor:
        """The mean distance of each image's patches, summed over images; see `Head.loss`.

        Raises:
            ValueError: when images and teacher have grids that do not fit.
        """
        hidden = [states[layer].flatten(0, 1) for layer in self.layers]
        patches = index_patches(batch.image_grids)
        ratio = self._ratio = _pool_ratio(batch.image_grids, targets.grids)
        positions = batch.image_positions[send(patches.position, batch.image_positions.device)]
        if ratio > 1:
            patches, order = _windows(patches, batch.image_grids, ratio)
            positions = positions[send(order, positions.device)]
        at_patches = [state[positions] for state in hidden]
        student = self.student([state.mean(1) if ratio > 1 else state for state in at_patches])
        places = _teacher_positions(patches, batch.image_grids, targets.grids, ratio)
        expected = targets.features[send(places, student.device)]
        return self._mean_distances(student, expected, patches.image)

    def predictions(self, states: Mapping[Tap, Tensor], batch: Batch) -> Mapping[str, VisualTokens]:
        """What is merged of all layers, at each patch; see `Head.predictions`."""
        student = self.student([at_patches(states[layer], batch) for layer in self.layers])
        layers = ", ".join(str(layer) for layer in sorted(self.layers))
        of = ", of the next patch" if self.target == "next" else ""
        return {f"layers {layers}{of}": VisualTokens(student.float(), patches_alone(batch.image_grids))}

    def flops(self) -> FlopsOf:
        """Operations per compared patch, or window of patches: the weights of all layers, and attention over layers."""
        weights, others = Weights.of(self.parameters()), len(self.layers) - 1

        def of(batch: Batch) -> Flops:
            compared = sum(grid.rows * grid.cols for grid in batch.image_grids) // self._ratio**2
            return weights.on(compared) + attention(self.input_layer.out_features, compared * others)

        return of

    def student(self, states: Sequence[Tensor]) -> Tensor:
        """Merge the states of all layers to the vector that is compared with the teacher.

        Args:
            states: `[p, d]` of each of `layers`, the last layer first.

        Returns:
            `[p, width of the teacher]`.
        """
        student: Tensor = self.input_layer(states[0])
        if len(self.layers) == 1:
            return student
        read = [norm(state) for norm, state in zip(self.norm_layer, states, strict=True)]
        query, others = self._split(read[0]), self._split(torch.stack(read[1:], dim=1))
        # [p, heads, 1, c] · [p, heads, layers, c]
        query, others = query.unsqueeze(2), others.transpose(1, 2)
        weights = (query @ others.transpose(2, 3) * student.shape[-1] ** -0.5).softmax(-1).to(others.dtype)
        return student + self.output_layer((weights @ others).flatten(1))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1))

    def _mean_distances(self, student: Tensor, targets: Tensor, image: Tensor) -> Tensor:
        """Distances as a mean over the patches of each image, summed over images.

        Args:
            student: `[p, width of the teacher]`.
            targets: `[p, width of the teacher]`.
            image: `[p]`, the image of each patch, on the CPU.
        """
        if self.target == "next":
            # The last patch of an image has no next one.
            pairs = (image[1:] == image[:-1]).nonzero().squeeze(1)
            image, pairs = image[pairs], send(pairs, student.device)
            student, targets = student[pairs], targets[pairs + 1]
        counts = send(image.bincount()[image], student.device)
        return (cosine_distance(student, targets) / counts).sum()


def _pool_ratio(grids: Sequence[Grid], teacher: Sequence[Grid]) -> int:
    """Image tokens per patch of the teacher, along a side; the same for all images.

    Raises:
        ValueError: where no whole number of tokens fits all images.
    """
    ratios = {max(own.rows, own.cols) / max(other.rows, other.cols) for own, other in zip(grids, teacher, strict=True)}
    ratio = max(1, round(next(iter(ratios))))
    fits = all(own.rows % ratio == 0 == own.cols % ratio for own in grids)
    if ratios != {ratio} or not fits or any(other.rows != other.cols for other in teacher):
        shapes = sorted({((o.rows, o.cols), (t.rows, t.cols)) for o, t in zip(grids, teacher, strict=True)})[:4]
        raise ValueError(
            "PatchAlignment needs images whose longer side has a whole multiple of the teacher's patches; "
            f"(rows, cols) of image and teacher: {shapes}. Set data.transform AspectGrid with cells = the teacher's "
            "patches per side and longest = cells · the encoder's pixels per token, or a multiple; and take a "
            "projector that leaves patches where they are"
        )
    return ratio


def _windows(patches: Patches, grids: Sequence[Grid], ratio: int) -> tuple[Patches, Tensor]:
    """Group patches into windows of ratio × ratio.

    Returns:
        the windows in place of patches, and the indices of each window's patches `[windows, ratio²]`.
    """
    cols = torch.tensor([grid.cols for grid in grids])[patches.image]
    # A number per window, rising within an image and from image to image: no image has more windows than tokens.
    window = patches.starts[patches.image] + (patches.row // ratio) * (cols // ratio) + patches.col // ratio
    order = window.argsort(stable=True).view(-1, ratio * ratio)
    chosen = order[:, 0]
    pooled = Patches(
        patches.image[chosen],
        patches.row[chosen] // ratio,
        patches.col[chosen] // ratio,
        patches.position[chosen],
        patches.starts,
    )
    return pooled, order


def _teacher_positions(patches: Patches, grids: Sequence[Grid], teacher: Sequence[Grid], ratio: int) -> Tensor:
    """Index `[p]` of each patch's place among the teacher's tokens, where pictures are centred in a square."""
    own = torch.tensor([(grid.rows, grid.cols) for grid in grids]) // ratio
    other = torch.tensor(teacher)
    rows, cols, prefix, row_end, suffix = other.unbind(1)
    top, left = (rows - own[:, 0]) // 2, (cols - own[:, 1]) // 2
    lengths = prefix + rows * (cols + row_end) + suffix
    start = lengths.cumsum(0) - lengths + prefix
    i = patches.image
    return start[i] + (patches.row + top[i]) * (cols + row_end)[i] + patches.col + left[i]
