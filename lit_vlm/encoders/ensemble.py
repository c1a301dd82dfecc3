"""Several encoders that look at the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.batch import Grid, Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict, real_parameters, standalone_class
from lit_vlm.encoders.base import Encoder, PatchGrid


@dataclass(frozen=True)
class WithSummaries(PatchGrid):
    """Layout with the first encoder's patches, and `suffix` tokens of the other encoders behind them."""

    suffix: int = 0

    def __call__(self, height: int, width: int) -> Grid:
        """Grid of an image of `height` × `width` pixels, with the suffix."""
        return super().__call__(height, width)._replace(suffix=self.suffix)


class Ensemble(Encoder):
    """Patches of the first encoder, fused with what further ones see (OLA-VLM, baselines with several encoders).

    Every encoder gets the picture that was made for the first one, resized on the device to the encoder's own size.

    - `channels`: features of all encoders side by side. Where another has fewer or more patches than the first, its
      map is interpolated; a single token goes to every patch. The width is the sum.
    - `tokens`: each further encoder adds `summary` tokens behind the patches: consecutive patches are averaged, a
      single token is repeated. Narrower features are filled up with zeros to the widest; `projectors.PerEncoder` takes
      them apart again.

    Args:
        encoders: two or more; the first gives the layout.
        fuse: `channels` or `tokens`.
        summary: tokens of each further encoder, with `tokens`.

    Raises:
        ValueError: for fewer than two encoders, or a first encoder with CLS or row-end tokens.
    """

    def __init__(
        self,
        encoders: list[Callable[[], Encoder]],
        fuse: Literal["channels", "tokens"] = "channels",
        summary: int = 8,
    ) -> None:
        super().__init__()
        if len(encoders) < 2:
            raise ValueError("Ensemble needs two encoders or more")
        self.fuse, self.summary = fuse, summary
        self._factories = encoders
        self.members = nn.ModuleList(factory() for factory in encoders)
        first = self.parts[0]
        self.widths = [member.width for member in self.parts]
        grid = first.patch_grid
        if grid.prefix or grid.row_end:
            raise ValueError("Ensemble: the first encoder must give patches only, without CLS or row-end tokens")
        if fuse == "channels":
            self.width = sum(self.widths)
            self.patch_grid = grid
        else:
            self.width = max(self.widths)
            self.patch_grid = WithSummaries(grid.patch, suffix=summary * (len(encoders) - 1))
        self.pixels = PixelSpec(first.pixels.size, first.pixels.multiple, first.pixels.mean)
        self.register_buffer("pixel_mean", first.pixel_mean, persistent=False)
        self.register_buffer("pixel_std", first.pixel_std, persistent=False)

    @property
    def parts(self) -> list[Encoder]:
        """The encoders."""
        return [member for member in self.members if isinstance(member, Encoder)]

    def identity(self) -> str:
        """The text of `Encoder.identity` for the ensemble, then for each member."""
        return " + ".join([super().identity(), *(member.identity() for member in self.parts)])

    def find_pretrained(self) -> None:
        """Check that the weights of all members are there.

        Raises:
            ValueError: saying what is missing.
        """
        for member in self.parts:
            member.find_pretrained()

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with those of all members that need no other file."""
        members = zip(self.parts, arguments["encoders"], strict=True)
        return {**arguments, "encoders": [standalone_class(member, given) for member, given in members]}

    def pretrained_state(self) -> StateDict | None:
        """Weights of all members; None if no member has pretrained ones.

        Raises:
            ValueError: as the members do.
        """
        states = [member.pretrained_state() for member in self.parts]
        if not any(states):
            return None
        whole: StateDict = {}
        for index, (state, factory) in enumerate(zip(states, self._factories, strict=True)):
            if state is None:
                with real_parameters():
                    state = factory().state_dict()
            whole |= {f"members.{index}.{key}": value for key, value in state.items()}
        return whole

    def blocks(self) -> list[nn.Module]:
        """The blocks of all members."""
        return [block for member in self.parts for block in member.blocks()]

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, image by image.

        Raises:
            ValueError: when an image is no square of the first encoder's size, where it takes one; with `fuse: tokens`,
                when the tokens of a further encoder do not divide into `summary`, or differ in number between images;
                and as the encoders do.
        """
        side = self.pixels.size
        if side is not None and (wrong := set(images.sizes) - {(side, side)}):
            raise ValueError(
                f"Ensemble takes images of {side} × {side} pixels, found {sorted(wrong)[:3]}; use data.transform "
                "SquareCrop, PadSquare or Resize"
            )
        grids = [self.patch_grid(*size) for size in images.sizes]
        seen = [self._look(member, images) for member in self.parts]
        first, *others = seen
        plain = first.grids
        if self.fuse == "channels":
            maps = [first.features, *(_on_patches(tokens, plain) for tokens in others)]
            return VisualTokens(
                torch.cat([features.to(first.features.dtype) for features in maps], dim=1), tuple(grids)
            )
        parts: list[Tensor] = []
        summaries = [self._wide(_summarise(tokens, self.summary)) for tokens in others]
        for index, features in enumerate(self._wide(first.features).split([grid.num_tokens for grid in plain])):
            parts += [features, *(summary[index].to(features.dtype) for summary in summaries)]
        return VisualTokens(torch.cat(parts), tuple(grids))

    def _wide(self, features: Tensor) -> Tensor:
        return F.pad(features, (0, self.width - features.shape[-1]))

    def _look(self, member: Encoder, images: Images) -> VisualTokens:
        with torch.no_grad() if member.frozen() else nullcontext():
            side = member.pixels.size
            if side is None or set(images.sizes) == {(side, side)}:
                return member(images)
            resized: list[Tensor | None] = [None] * len(images)
            for indices, pixels in images.groups():
                # As floats: the byte version of this resize is for CPUs only.
                x = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
                for index, one in zip(indices, x.round().clamp(0, 255).to(torch.uint8), strict=True):
                    resized[index] = one
            return member(Images.pack([one for one in resized if one is not None]))


def _on_patches(tokens: VisualTokens, grids: tuple[Grid, ...]) -> Tensor:
    """Resample features to the grids of another encoder's patches: `[t', d]` → `[t, d]`."""
    parts = []
    for features, own, grid in zip(
        tokens.features.split([g.num_tokens for g in tokens.grids]), tokens.grids, grids, strict=True
    ):
        if (own.rows, own.cols) == (grid.rows, grid.cols):
            parts.append(features)
        elif own.num_tokens == 1:
            parts.append(features.expand(grid.num_tokens, -1))
        else:
            x = features.float().view(1, own.rows, own.cols, -1).permute(0, 3, 1, 2)
            x = F.interpolate(x, (grid.rows, grid.cols), mode="bilinear", antialias=True, align_corners=False)
            parts.append(x.flatten(2)[0].T.to(features.dtype))
    return torch.cat(parts)


def _summarise(tokens: VisualTokens, count: int) -> Tensor:
    """Summarise an image by `count` tokens: means of consecutive ones, or its only token repeated. `[n, count, d]`."""
    lengths = {grid.num_tokens for grid in tokens.grids}
    if len(lengths) > 1:
        raise ValueError("Ensemble: fuse tokens needs further encoders of one picture size")
    length = lengths.pop()
    x = tokens.features.view(len(tokens.grids), length, -1)
    if length == 1:
        return x.expand(-1, count, -1)
    if length % count:
        raise ValueError(f"Ensemble: {length} tokens of an encoder do not divide into summary {count}")
    return x.unflatten(1, (count, -1)).mean(2)
