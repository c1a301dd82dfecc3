"""The contract of a teacher, and the teacher that is any encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.narrow import narrow_operands
from lit_vlm.core.part import empty_parameters, load_state, meta_parameters, real_parameters
from lit_vlm.encoders.base import Encoder


class Teacher(ABC):
    """A frozen network. It is no `nn.Module`, so a head that holds one neither saves, shards, moves nor trains it.

    Attributes:
        width: features per token.
        pixels: what the teacher wants of an image; the loader's workers prepare its images.
        known: name of the map, carried by each picture, that takes the place of computed features; None for a teacher
            that computes them from images.
    """

    width: int
    pixels: PixelSpec
    known: str | None = None

    @abstractmethod
    def __call__(self, images: Images) -> VisualTokens:
        """Target features of all images, `[t, width]`, without a graph; on the device of the pixels.

        Raises:
            ValueError: for images that the teacher does not take.
        """

    @abstractmethod
    def identity(self) -> str:
        """What decides the teacher's features, as text: prepared features of another identity are refused."""

    def colours(self, features: Tensor) -> Tensor | None:
        """Features `[t, width]` as red, green and blue from 0 to 1, `[t, 3]`; None where numbers mean no colour."""
        return None

    def network(self) -> Callable[[], Encoder] | None:
        """A factory of the encoder that the teacher runs, for counting its operations; None if it runs none."""
        return None

    def find_pretrained(self) -> None:
        """Check that the weights that `load` reads are there, without reading them.

        Raises:
            ValueError: saying what is missing.
        """
        return

    def load(self) -> None:
        """Read the weights onto the CPU, unless they were read; called when the model is built.

        Raises:
            ValueError: where they are missing or do not fit.
        """
        return

    def load_empty(self, dtype: torch.dtype | None) -> None:
        """Give the weights memory without values, where a step is only planned; by default they are read.

        Args:
            dtype: as for `narrow`; None: their own.
        """
        self.load()
        if dtype is not None:
            self.narrow(dtype)

    def narrow(self, dtype: torch.dtype) -> None:
        """Store weights in `dtype` that autocast to it rounds before each use; called after `load`, if at all.

        By default nothing happens, which costs memory and nothing else.

        Raises:
            ValueError: for weights beyond the range of `dtype`.
        """
        return

    @torch.no_grad()
    def targets(self, given: Images | VisualTokens) -> VisualTokens:
        """Target features `[t, width]` in fp32, without a graph.

        Args:
            given: images, whose features are computed, or features that were computed before.

        Raises:
            ValueError: for images that the teacher does not take.
        """
        tokens = given if isinstance(given, VisualTokens) else self(given)
        return VisualTokens(tokens.features.float(), tokens.grids)


class EncoderTeacher(Teacher):
    """Any encoder as a teacher.

    Args:
        encoder: factory of the encoder; its pretrained weights are read by `load`, or when the teacher is first used.
    """

    def __init__(self, encoder: Callable[[], Encoder]) -> None:
        self._factory = encoder
        with meta_parameters():
            self.encoder = encoder()
        self.width = self.encoder.width
        self.pixels = self.encoder.pixels
        self._device: torch.device | None = None

    def identity(self) -> str:
        """The identity of the encoder."""
        return self.encoder.identity()

    def network(self) -> Callable[[], Encoder]:
        """The factory of the encoder."""
        return self._factory

    def find_pretrained(self) -> None:
        """Check that the weights of the encoder are there.

        Raises:
            ValueError: saying what is missing.
        """
        self.encoder.find_pretrained()

    def load(self) -> None:
        """Read the encoder's weights; without pretrained ones, draw random ones that are the same on every rank.

        Raises:
            ValueError: where weights are missing or do not fit.
        """
        if self._device is not None:
            return
        self._device = torch.device("cpu")
        # The model may be built on an accelerator, and its random numbers must not depend on the teacher.
        with self._device, torch.random.fork_rng(devices=[]):
            if (state := self.encoder.pretrained_state()) is not None:
                load_state(self.encoder, state, "teacher")
            else:
                torch.manual_seed(0)
                with real_parameters():
                    self.encoder = self._factory()
        self.encoder.eval().requires_grad_(False).to(self._device)

    def load_empty(self, dtype: torch.dtype | None) -> None:
        """Give the encoder's weights memory on the CPU that holds no values.

        Args:
            dtype: as for `narrow`; None: their own.
        """
        if dtype is not None:
            self.narrow(dtype)
        self._device = torch.device("cpu")
        empty_parameters(self.encoder)
        self.encoder.eval().requires_grad_(False)

    def narrow(self, dtype: torch.dtype) -> None:
        """Store the weights of the encoder's linear layers and convolutions in `dtype`.

        Raises:
            ValueError: for weights beyond the range of `dtype`.
        """
        narrow_operands(self.encoder, dtype, "the encoder")

    def _on(self, device: torch.device) -> Encoder:
        self.load()
        if self._device != device:
            self.encoder.to(device)
            self._device = device
        return self.encoder

    @torch.no_grad()
    def __call__(self, images: Images) -> VisualTokens:
        """Features of all images, `[t, width]`, without a graph.

        Raises:
            ValueError: for pictures of another size than the encoder's.
        """
        side = self.pixels.size
        if side and (wrong := {size for size in images.sizes if size[1] != side or size[0] % side}):
            raise ValueError(
                f"the teacher takes pictures of {side} × {side} pixels, and data.transform made {sorted(wrong)[:3]} "
                "for it: take AspectGrid where the encoder takes any size, and a square transform or Tiles where it "
                "does not"
            )
        return self._on(images.pixels.device)(images)
