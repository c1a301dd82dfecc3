"""The contract of a teacher, and the teacher that is any encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import load_state, meta_parameters, real_parameters
from lit_vlm.encoders.base import Encoder


class Teacher(ABC):
    """A frozen network. It is no `nn.Module`, so a head that holds one neither saves, shards, moves nor trains it.

    Attributes:
        width: features per token.
        pixels: what it wants of an image; the loader's workers prepare its images.
        known: the map of a picture that takes the place of its features, so that it never sees an image; or None.
    """

    width: int
    pixels: PixelSpec
    known: str | None = None

    @abstractmethod
    def __call__(self, images: Images) -> VisualTokens:
        """Target features of all images, `[t, width]`, without a graph; on the device of the pixels."""

    @abstractmethod
    def identity(self) -> str:
        """What decides its features, as text: prepared features of another teacher are refused."""

    def network(self) -> Callable[[], Encoder] | None:
        """What makes the encoder that it runs, for counting its operations; None if it computes nothing."""
        return None

    def find_pretrained(self) -> None:
        """See that the weights that `load` reads are there, without reading them.

        Raises:
            ValueError: saying what is missing.
        """
        return

    def load(self) -> None:
        """Read the weights, onto the CPU, unless that is done; called when the model is built.

        Raises:
            ValueError: where they are missing or do not fit.
        """
        return

    @torch.no_grad()
    def targets(self, given: Images | VisualTokens) -> VisualTokens:
        """Features of images, computed now or before: in fp32 and without a graph."""
        tokens = given if isinstance(given, VisualTokens) else self(given)
        return VisualTokens(tokens.features.float(), tokens.grids)


class EncoderTeacher(Teacher):
    """Any encoder as a teacher.

    Args:
        encoder: the encoder; its pretrained weights are read by `load`, or when the teacher is first used.
    """

    def __init__(self, encoder: Callable[[], Encoder]) -> None:
        self._factory = encoder
        with meta_parameters():
            self.encoder = encoder()
        self.width = self.encoder.width
        self.pixels = self.encoder.pixels
        self._device: torch.device | None = None

    def identity(self) -> str:
        """The encoder's."""
        return self.encoder.identity()

    def network(self) -> Callable[[], Encoder]:
        """The factory."""
        return self._factory

    def find_pretrained(self) -> None:
        """Those of the encoder."""
        self.encoder.find_pretrained()

    def load(self) -> None:
        """The encoder's weights; without pretrained ones, random ones that are the same on every rank."""
        if self._device is not None:
            return
        self._device = torch.device("cpu")
        # Whoever builds a model may build on an accelerator, and goes on with the random numbers that it had.
        with self._device, torch.random.fork_rng(devices=[]):
            if (state := self.encoder.pretrained_state()) is not None:
                load_state(self.encoder, state, "teacher")
            else:
                torch.manual_seed(0)
                with real_parameters():
                    self.encoder = self._factory()
        self.encoder.eval().requires_grad_(False).to(self._device)

    def _on(self, device: torch.device) -> Encoder:
        self.load()
        if self._device != device:
            self.encoder.to(device)
            self._device = device
        return self.encoder

    @torch.no_grad()
    def __call__(self, images: Images) -> VisualTokens:
        """Features of all images.

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
