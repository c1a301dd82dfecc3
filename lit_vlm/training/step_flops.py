"""Model FLOPs of a training step: each part's forward pass, and the gradients that are computed in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lit_vlm.core.batch import ENCODER, Batch, Grid, Images, VisualTokens
from lit_vlm.core.flops import FlopsOf, Weights, executed
from lit_vlm.core.part import Part, meta_parameters
from lit_vlm.encoders import Encoder
from lit_vlm.heads import Head
from lit_vlm.model.build import Slots
from lit_vlm.model.vlm import NEXT_TOKEN, VLM
from lit_vlm.projectors import Projector

META = torch.device("meta")
P = TypeVar("P", bound=Part)
Key = TypeVar("Key", bound=Hashable)
Size = tuple[int, int]


class StepFlops:
    """Counts the model FLOPs of forward and backward of micro-batches.

    Encoders, projectors and teachers treat one image at a time. They are built again on the meta device, where one
    image of each new size runs forward and backward once, with the same parameters frozen. Embedder, decoder and heads
    state theirs by formula, as they depend on how a batch is put together.

    Args:
        model: sharded or not, after `Stage.freeze`.
        slots: the factories that it was built with.
        losses: weight of each loss.
    """

    def __init__(self, model: VLM, slots: Slots, losses: Mapping[str, float]) -> None:
        # Constructors draw random numbers; forked, so that training's own sequence does not change.
        with meta_parameters(), torch.random.fork_rng(devices=[]):
            encoder = slots.adapted("encoder", slots.encoder())
            projector = slots.adapted("projector", slots.projector(encoder.width, model.decoder.width))
        self._encoder = _Seeing(encoder, model.encoder)
        self._projector = _Projecting(projector, model.projector, read=self._encoder.trains)
        self._heads: dict[str, FlopsOf] = {}
        self._teachers: dict[str, _Seeing] = {}
        heads = {name: head for name, head in model.heads.items() if isinstance(head, Head) and losses.get(name)}
        for name, head in heads.items():
            self._heads[name] = head.flops()
            if head.teacher is not None and (factory := head.teacher.network()) is not None:
                with meta_parameters(), torch.random.fork_rng(devices=[]):
                    self._teachers[name] = _Seeing(factory(), None)
        self._embedder = model.embedder.flops()
        read = any(isinstance(tap, int) and tap > 0 for head in heads.values() for tap in head.taps)
        self._decoder = model.decoder.flops() if read or losses.get(NEXT_TOKEN) else None
        self._logits = Weights.of(model.decoder.head_parameters() if losses.get(NEXT_TOKEN) else ())
        # Whether a gradient passes the embedder, and the decoder.
        self._to_embedder = self._projector.trains or self._encoder.trains or not model.embedder.frozen()
        self._to_decoder = self._to_embedder or not model.decoder.frozen()

    def __call__(self, batch: Batch) -> float:
        """Model FLOPs of one micro-batch, forward and backward."""
        prepared = batch.prepared.get(ENCODER)
        sizes = () if prepared is not None else batch.images.sizes
        grids = (
            list(prepared.grids) if prepared is not None else [self._encoder.part.patch_grid(*size) for size in sizes]
        )
        total = self._encoder(sizes) + self._projector(grids)
        total += self._embedder(batch).total(self._to_embedder)
        if self._decoder is not None:
            blocks = self._decoder(batch) + self._logits.on(len(batch.targets))
            total += blocks.total(self._to_decoder)
        for name, of in self._heads.items():
            total += of(batch).total(self._to_decoder)
            if name in self._teachers and name not in batch.prepared and name in batch.teacher_images:
                total += self._teachers[name](batch.teacher_images[name].sizes)
        return total


class _Twin(ABC, Generic[P, Key]):
    """A copy of a part on the meta device that runs one image at a time; its FLOPs are counted once for each key.

    Args:
        twin: the copy, with parameters on the meta device.
        part: the original; its frozen parameters are frozen in the copy too. None: all are.
        read: whether a gradient flows into the copy's input.
    """

    def __init__(self, twin: P, part: Part | None, read: bool = False) -> None:
        self.part, self._read = twin.to(META).eval(), read
        trained = {name for name, p in part.named_parameters() if p.requires_grad} if part is not None else set()
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in trained)
        self.trains = bool(trained)
        self._known: dict[Key, float] = {}

    @abstractmethod
    def _run(self, key: Key) -> Tensor:
        """The copy's features of one image."""

    def __call__(self, keys: Iterable[Key]) -> float:
        """FLOPs of these images, forward and backward."""
        return sum(count * self._count(key) for key, count in Counter(keys).items())

    def _count(self, key: Key) -> float:
        if key not in self._known:
            with torch.set_grad_enabled(self._read or self.trains):
                self._known[key] = executed(lambda: self._run(key))
        return self._known[key]


class _Seeing(_Twin[Encoder, Size]):
    """A copy of an encoder; keys are (height, width) of a picture."""

    def _run(self, key: Size) -> Tensor:
        pixels = torch.empty(3 * key[0] * key[1], dtype=torch.uint8, device=META)
        return self.part(Images(pixels, (key,))).features


class _Projecting(_Twin[Projector, Grid]):
    """A copy of a projector; keys are grids of the encoder's tokens."""

    def _run(self, key: Grid) -> Tensor:
        shape = (key.num_tokens, self.part.in_width)
        return self.part(VisualTokens(torch.empty(shape, device=META, requires_grad=self._read), (key,))).features
