"""The structures that flow from the collator through the model to the losses.

Letters used in shapes everywhere in this package: b rows, s positions of a row, d decoder width, d_e encoder width,
v vocabulary, n images of the batch, t visual tokens of the batch, k supervised positions of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_vlm.core.tiling import Tiling

IGNORE = -100
"""The label of a position that carries no loss."""
ENCODER = "encoder"
"""Key of the encoder in mappings whose other keys are names of heads, such as `Batch.prepared`."""
Segments = tuple[tuple[int, ...], ...]
"""Length of each segment of each row, in order; padding behind the last one counts to it, so all rows add up to s."""


class Grid(NamedTuple):
    """How the visual tokens of one image are laid out.

    The order is: `prefix` tokens, then for each of `rows` rows its `cols` patches and `row_end` closing tokens, then
    `suffix` tokens.
    """

    rows: int
    cols: int
    prefix: int = 0
    row_end: int = 0
    suffix: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the image: prefix + rows · (cols + row_end) + suffix."""
        return self.picture_tokens + self.suffix

    @property
    def picture_tokens(self) -> int:
        """Tokens that show the picture: prefix + rows · (cols + row_end)."""
        return self.prefix + self.rows * (self.cols + self.row_end)


def patches_alone(grids: Sequence[Grid]) -> tuple[Grid, ...]:
    """The grids without the tokens around their patches."""
    return tuple(Grid(grid.rows, grid.cols) for grid in grids)


class Patches(NamedTuple):
    """Where the p patches of n images are among their visual tokens: row by row, without the tokens around them.

    Attributes:
        image: `[p]`, which image.
        row: `[p]`, which row of that image's grid.
        col: `[p]`, which column.
        position: `[p]`, index into the t visual tokens.
        starts: `[n]`, index of each image's first token.
    """

    image: Tensor
    row: Tensor
    col: Tensor
    position: Tensor
    starts: Tensor


def index_patches(grids: Sequence[Grid]) -> Patches:
    """Find the patches of all images at once: int64 on the CPU, from plain integers, so it never waits for a device."""
    rows, cols, prefix, row_end, suffix = torch.tensor(grids, dtype=torch.long).reshape(-1, 5).unbind(1)
    starts = _exclusive_sum(prefix + rows * (cols + row_end) + suffix)
    image = torch.arange(len(grids)).repeat_interleave(rows * cols)
    within = torch.arange(len(image)) - _exclusive_sum(rows * cols)[image]
    row, col = within // cols[image], within % cols[image]
    return Patches(image, row, col, starts[image] + prefix[image] + row * (cols + row_end)[image] + col, starts)


def index_suffixes(grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
    """Find the suffix tokens of all images: int64 on the CPU, from plain integers.

    Returns:
        indices into the t visual tokens: of all tokens that are no suffix `[t']`, and of each image's suffix
        `[n, suffix]`.

    Raises:
        ValueError: when images have suffixes of different length.
    """
    lengths = torch.tensor([grid.num_tokens for grid in grids], dtype=torch.long)
    suffixes = {grid.suffix for grid in grids} or {0}
    if len(suffixes) > 1:
        raise ValueError(f"images of one batch have {sorted(suffixes)} tokens after their patches")
    suffix = suffixes.pop()
    ends = lengths.cumsum(0)
    within = ends[:, None] - suffix + torch.arange(suffix)
    others = torch.ones(int(lengths.sum()), dtype=torch.bool)
    others[within.flatten()] = False
    return others.nonzero().squeeze(1), within


def index_row_ends(grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
    """Find the closing tokens of all rows of all images: int64 on the CPU, from plain integers.

    Returns:
        indices into the t visual tokens: of all tokens that close no row `[t']`, and of those that do `[t'']`.
    """
    rows, cols, prefix, row_end, suffix = torch.tensor(grids, dtype=torch.long).reshape(-1, 5).unbind(1)
    starts = _exclusive_sum(prefix + rows * (cols + row_end) + suffix)
    image = torch.arange(len(grids)).repeat_interleave(rows * row_end)
    within = torch.arange(len(image)) - _exclusive_sum(rows * row_end)[image]
    row, place = within // row_end[image], within % row_end[image]
    ends = starts[image] + prefix[image] + row * (cols + row_end)[image] + cols[image] + place
    others = torch.ones(sum(grid.num_tokens for grid in grids), dtype=torch.bool)
    others[ends] = False
    return others.nonzero().squeeze(1), ends


def _exclusive_sum(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


@dataclass(frozen=True)
class PixelSpec:
    """What an encoder wants of an image; the data side hands it to the image transform.

    Attributes:
        size: side of the square in pixels, or None for any size.
        multiple: sides must be a multiple of this many pixels.
        mean: the colour that counts as zero, 0 to 1: what padding is filled with.
        resize: how a teacher's square is made, whatever `data.transform` does for the encoder: `squash` the picture, or
            `crop` its middle. None: the picture is resized by `data.transform`, like the encoder's.
    """

    size: int | None
    multiple: int
    mean: tuple[float, float, float]
    resize: Literal["squash", "crop"] | None = None


@dataclass
class Images:
    """Pixels of n images of any size, packed end to end.

    Attributes:
        pixels: uint8 `[sum(3·h·w)]`; each image is stored channel, row, column. Normalisation is the encoder's work.
        sizes: (height, width) of each image; plain integers, so that geometry never waits for the device.
    """

    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]

    @staticmethod
    def pack(images: Sequence[Tensor]) -> Images:
        """Pack uint8 images `[3, h, w]`."""
        sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
        if not images:
            return Images(torch.empty(0, dtype=torch.uint8), sizes)
        return Images(torch.cat([image.reshape(-1) for image in images]), sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def groups(self) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (indices, uint8 `[m, 3, h, w]`) for each distinct size: a loop over sizes, never over images."""
        if len(set(self.sizes)) == 1:
            height, width = self.sizes[0]
            yield list(range(len(self))), self.pixels.view(len(self), 3, height, width)
            return
        members: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(self.sizes):
            members.setdefault(size, []).append(index)
        parts = self.pixels.split([3 * h * w for h, w in self.sizes])
        for (height, width), indices in members.items():
            yield indices, torch.stack([parts[i] for i in indices]).view(-1, 3, height, width)

    def to(self, *args: Any, **kwargs: Any) -> Images:
        """Move the pixels; same arguments as `Tensor.to`."""
        return Images(self.pixels.to(*args, **kwargs), self.sizes)

    def pin_memory(self) -> Images:
        """Pin the pixels, for an asynchronous copy to a device."""
        return Images(self.pixels.pin_memory(), self.sizes)


@dataclass
class VisualTokens:
    """Features of all images of a batch, end to end.

    Attributes:
        features: `[t, d_e]` after the encoder, `[t, d]` after the projector.
        grids: one `Grid` per image; their token counts add up to t.
    """

    features: Tensor
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        expected = sum(grid.num_tokens for grid in self.grids)
        assert self.features.shape[0] == expected, (self.features.shape, self.grids)

    def to(self, *args: Any, **kwargs: Any) -> VisualTokens:
        """Move the features; same arguments as `Tensor.to`."""
        return VisualTokens(self.features.to(*args, **kwargs), self.grids)

    def pin_memory(self) -> VisualTokens:
        """Pin the features, for an asynchronous copy to a device."""
        return VisualTokens(self.features.pin_memory(), self.grids)


class Opening(NamedTuple):
    """What a template lets every answer begin with, such as an empty thought.

    Attributes:
        text: as it is decoded.
        tokens: how many it has.
    """

    text: str = ""
    tokens: int = 0


NO_OPENING = Opening()


class SampleInfo(NamedTuple):
    """Where a sample sits in the batch, and what it is.

    Attributes:
        row: row of the batch.
        segment: number of the sample in its row, from 1, as in `Batch.segment_ids`.
        id: id of its record.
        source: name of the source that the record came from.
        num_images: images of the sample.
        num_supervised: positions with a loss.
        num_tokens: positions, image tokens included.
    """

    row: int
    segment: int
    id: str
    source: str
    num_images: int
    num_supervised: int
    num_tokens: int


DENIED = "denied"
"""Reason of a sample that a deny-list names."""


class BadSample(NamedTuple):
    """A sample that could not be used, or was used only in part, and why.

    Attributes:
        id: id of its record.
        source: name of the source that the record came from.
        reason: a short code that bad samples are counted by.
        detail: what was found and what was expected.
        dropped: False for a sample that is in the batch, cut to the allowed length.
    """

    id: str
    source: str
    reason: str
    detail: str
    dropped: bool = True

    @property
    def faulty(self) -> bool:
        """Whether it was left out because of a fault, and not because it is denied."""
        return self.dropped and self.reason != DENIED


class Counts(NamedTuple):
    """What a batch holds: the denominators of losses and the numerators of throughput.

    Attributes:
        samples: number of samples.
        tokens: positions that are not padding.
        supervised: positions with a next-token loss.
        images: number of images.
        visual_tokens: positions of image tokens.
        positions: all positions, padding included.
    """

    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    images: int = 0
    visual_tokens: int = 0
    positions: int = 0

    @property
    def text_tokens(self) -> int:
        """Tokens that belong to no image."""
        return self.tokens - self.visual_tokens

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Window(NamedTuple):
    """What all micro-batches of an optimizer step hold together on one rank.

    Attributes:
        counts: sum of the counts of the micro-batches.
        own: sums of the counts that heads define themselves (`Head.normaliser`), by the head's name.
    """

    counts: Counts
    own: Mapping[str, float] = {}


@dataclass
class Batch:
    """One micro-batch; every image already owns its exact number of positions, so the model only scatters.

    Attributes:
        input_ids: `[b, s]`; at image positions the id means nothing.
        labels: `[b, s]`, -100 wherever nothing is supervised: prompts, images, padding, the start of each segment.
        position_ids: `[b, s]`, restarting at 0 in each segment. Padding goes on counting from the last segment, so
            that a row with one segment is a plain range, which needs no mask: causal attention never looks right.
        segment_ids: `[b, s]`, 1, 2, ... for the samples of a row and 0 for padding.
        images: the pixels.
        image_grids: the layout of each image's tokens in the sequence (after the projector).
        image_positions: `[t]`, index into b·s of each visual token, in the order of `images`.
        target_positions: `[k]`, index into b·s of each position whose next token is supervised.
        targets: `[k]`, those next tokens.
        num_tokens: positions that are not padding; counted by the collator, as counting on a device would wait for it.
        samples: one entry per sample, in order.
        teacher_images: pixels as each head's teacher wants them, by the head's name; the same images in order.
        prepared: features that were computed before training and are read instead of images: those of a teacher under
            the head's name, those of a frozen encoder under `encoder`.
        bad: samples that were left out or cut while this batch was made.
        window: counts over all micro-batches of the optimizer step; None if the loader knows nothing of steps.
        stop_ids: token ids that close an answer in the template of the prompts; empty in training.
        opening: what answers to the prompts begin with in their template; no part of an answer.
        segments: lengths of the segments that `position_ids` make, in plain integers, so that nobody must ask the
            device for them; None if they are not known.
        tilings: how the tiles of each image make it up, in the order of `images`; None for an image that is not of
            tiles, or whose tiles stay as they come. Empty: there is no image of tiles.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    images: Images
    image_grids: tuple[Grid, ...]
    image_positions: Tensor
    target_positions: Tensor
    targets: Tensor
    num_tokens: int
    samples: tuple[SampleInfo, ...]
    teacher_images: dict[str, Images] = field(default_factory=dict)
    prepared: dict[str, VisualTokens] = field(default_factory=dict)
    bad: tuple[BadSample, ...] = ()
    window: Window | None = None
    stop_ids: frozenset[int] = frozenset()
    opening: Opening = NO_OPENING
    segments: Segments | None = None
    tilings: tuple[Tiling | None, ...] = ()

    @property
    def counts(self) -> Counts:
        """What this micro-batch holds."""
        return Counts(
            samples=len(self.samples),
            tokens=self.num_tokens,
            supervised=len(self.targets),
            images=len(self.image_grids),
            visual_tokens=len(self.image_positions),
            positions=self.input_ids.numel(),
        )

    def text_only(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None = None) -> Batch:
        """A batch of text that continues rows of this batch, without images: decoding steps, or answers to be scored.

        Args:
            input_ids: `[b', s']`.
            position_ids: `[b', s']`, counted on from the rows that are continued.
            labels: `[b', s']`, -100 wherever nothing is scored; default: everywhere.
        """
        empty = self.image_positions[:0]
        if labels is None:
            labels, (positions, targets) = torch.full_like(input_ids, IGNORE), (empty, empty)
        else:
            positions, targets = find_targets(labels)
        return replace(
            self,
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            segment_ids=torch.ones_like(input_ids),
            images=Images(self.images.pixels[:0], ()),
            image_grids=(),
            image_positions=empty,
            target_positions=positions,
            targets=targets,
            num_tokens=input_ids.numel(),
            samples=(),
            teacher_images={},
            prepared={},
            bad=(),
            segments=None,
            tilings=(),
        )

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """Move every tensor; same arguments as `Tensor.to`."""
        return self._map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> Batch:
        """Pin every tensor, for an asynchronous copy to a device."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, function: Any) -> Batch:
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor | Images | VisualTokens):
                changes[item.name] = function(value)
            elif isinstance(value, Mapping):
                changes[item.name] = {key: function(entry) for key, entry in value.items()}
        return replace(self, **changes)


def fill(lengths: Sequence[int], length: int) -> tuple[int, ...]:
    """Lengths of a row's segments, with the padding behind them counted to the last one; a row of padding is one."""
    return (*lengths[:-1], length - sum(lengths[:-1]))


def find_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Find where the next-token loss is taken; called once per batch, on the CPU.

    Args:
        labels: `[b, s]` aligned with the inputs: the label at i is the token at i. The label at the first position of
            a segment must be -100, so that no segment predicts the start of the next one.

    Returns:
        positions `[k]`, indices into b·s whose next position is supervised, and the labels `[k]` of those next ones.
    """
    flat = labels.reshape(-1)
    supervised = (labels[:, 1:] != IGNORE).nonzero()
    positions = supervised[:, 0] * labels.shape[1] + supervised[:, 1]
    return positions, flat[positions + 1]
