"""Encoding: record → ids, labels and pixels, in a loader worker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_vlm.core.batch import ENCODER, IGNORE, NO_OPENING, BadSample, Grid, Opening, PixelSpec
from lit_vlm.core.tiling import Tiling, as_they_come
from lit_vlm.core.tokenizers import decoded
from lit_vlm.data.records import Image, Record, RecordError, Videos, decode_image, image_size
from lit_vlm.data.sample.frames import fit_frames
from lit_vlm.data.sample.pieces import IMAGE_SLOT, encode_pieces
from lit_vlm.data.sample.prepared import Prepared
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.spelling import spelling_of
from lit_vlm.data.sample.templates import Piece, Template, is_blank
from lit_vlm.data.sample.transforms import ImageTransform, Size, transform_for
from lit_vlm.data.sources.base import Source, describe


@dataclass
class Sample:
    """A record, ready to be put into a batch.

    Attributes:
        id: id of the record.
        source: name of the record's source.
        ids: token ids; 0 at image positions.
        labels: aligned with `ids`, -100 where nothing is supervised.
        image_starts: index of each image's first position.
        grids: layout of each image's tokens.
        images: pixels of each image for the encoder, uint8 `[3, h, w]`.
        teacher_images: head → pixels of each image for the head's teacher, uint8 `[3, h, w]`.
        features: head or `encoder` → features `[t, width]` of each image that were prepared or come with the picture,
            and their layout.
        options: answers to choose from.
        note: what was cut off; None for a whole sample.
        stop_ids: ids that close the answer to a prompt, besides those that end any answer (`InputSpec.stop_ids`).
        opening: what an answer to a prompt begins with in its template.
        tilings: how the tiles of each image make it up; None for one that is not of tiles, or whose tiles stay as they
            come. Empty: there is none of tiles.
    """

    id: str
    source: str
    ids: list[int]
    labels: list[int]
    image_starts: list[int] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    teacher_images: dict[str, list[Tensor]] = field(default_factory=dict)
    features: dict[str, list[tuple[Tensor, Grid]]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    note: BadSample | None = None
    stop_ids: frozenset[int] = frozenset()
    opening: Opening = NO_OPENING
    tilings: list[Tiling | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_supervised(self) -> int:
        """Positions with a loss; the first one has none, as nothing precedes it."""
        return sum(label != IGNORE for label in self.labels[1:])


def documents_of(record: Record) -> list[Record]:
    """Split a record of several documents into one record for each; any other record stays as it is."""
    if len(record.messages) < 2 or any(message.role != "document" for message in record.messages):
        return [record]
    return [replace(record, id=f"{record.id}/{n}", messages=(one,)) for n, one in enumerate(record.messages)]


def _known(image: Image, name: str) -> tuple[Tensor, Grid]:
    """A map that the picture carries, as features `[t, width]` and their layout; raises `RecordError` without one."""
    if image.maps is None or name not in image.maps:
        raise RecordError(
            "no_map", f"the picture carries no map '{name}', only {sorted(image.maps or ())}; see Scenes(maps=...)"
        )
    rows, cols, width = image.maps[name].shape
    return torch.from_numpy(image.maps[name]).view(-1, width), Grid(rows, cols)


@dataclass(frozen=True)
class SampleEncoder:
    """Record → `Sample`, in a loader worker.

    Attributes:
        spec: what the data side knows of the model.
        template: how messages are written.
        transform: how pictures are resized.
        max_length: most positions of a sample.
        too_long: whether a longer sample loses its tail (images only as a whole) or is dropped.
        prompt: write only up to the next answer, for generation.
        fast_jpeg: decode a JPEG at a fraction of its size where that leaves at least twice what is needed.
        prepared: head or `encoder` → set of features that are read instead of computed.
    """

    spec: InputSpec
    template: Template
    transform: ImageTransform
    max_length: int
    too_long: Literal["truncate", "drop"] = "truncate"
    prompt: bool = False
    fast_jpeg: bool = False
    prepared: Mapping[str, Prepared] = field(default_factory=dict)

    @property
    def _eos(self) -> str:
        return self.spec.tokenizer.eos_token or ""

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        closing = spelling_of(self.spec.tokenizer).single(self.template.closing(self._eos))
        return frozenset() if closing is None else frozenset([closing])

    @cached_property
    def _opening(self) -> Opening:
        ids = self.spec.tokenizer(self.template.opening(), add_special_tokens=False).input_ids
        return Opening(decoded(self.spec.tokenizer, ids), len(ids)) if ids else NO_OPENING

    def sequences(self, record: Record, image_folder: Path) -> list[Sample]:
        """Encode a record: to one sample, or to one for each document of a record of several.

        Args:
            record: the record.
            image_folder: what image paths are relative to.

        Raises:
            RecordError: with the reason why it cannot be used.
        """
        return [self(part, image_folder) for part in documents_of(record)]

    def __call__(self, record: Record, image_folder: Path) -> Sample:
        """Encode a record that is a single sequence.

        Args:
            record: the record.
            image_folder: what image paths are relative to.

        Raises:
            RecordError: with the reason why it cannot be used.
        """
        given, record = record, self._with_fitting_frames(record, image_folder)
        pieces, ids, labels = self._encoded(record)
        sample = Sample(record.id, record.source, [], [], options=record.options)
        if self.prompt:
            sample.stop_ids, sample.opening = self._stop_ids, self._opening
        images = iter([piece for piece in pieces if isinstance(piece, Image)])
        with Videos() as videos:
            for token, label in zip(ids, labels, strict=True):
                if token == IMAGE_SLOT:
                    self._add_image(sample, next(images), image_folder, videos)
                else:
                    sample.ids.append(token)
                    sample.labels.append(label)
        had, kept = (sum(image.moment is not None for image in one.images) for one in (given, record))
        if kept < had:
            detail = f"{kept} of {had} frames fit, max_length is {self.max_length}"
            sample.note = BadSample(sample.id, sample.source, "fewer_frames", detail, dropped=False)
        self._fit(sample)
        if self.prompt and not sample.ids:
            name = type(self.template).__name__
            raise RecordError(
                "empty_prompt", f"the template {name} writes nothing of this question, which has no image"
            )
        if not self.prompt and sample.num_supervised == 0:
            raise RecordError("no_supervision", "no token of this sample carries a loss")
        return sample

    def _with_fitting_frames(self, record: Record, folder: Path) -> Record:
        """The record, with fewer frames of its videos where it is longer than `max_length`."""
        return fit_frames(record, lambda one: self._length(one, folder), self.max_length)

    def _encoded(self, record: Record) -> tuple[list[Piece], list[int], list[int]]:
        """The pieces of a record, or of its prompt, with their ids and labels, `IMAGE_SLOT` for each image."""
        pieces = self.template.prompt(record.messages, self._eos) if self.prompt else self._rendered(record)
        return pieces, *encode_pieces(pieces, self.spec, self._bos(record))

    def _length(self, record: Record, folder: Path) -> int:
        """Number of positions of a record, without decoding an image."""
        pieces, ids, _ = self._encoded(record)
        images = [piece for piece in pieces if isinstance(piece, Image)]
        return len(ids) - len(images) + sum(self._image_tokens(image, folder) for image in images)

    def _bos(self, record: Record) -> bool:
        """Whether the tokenizer's own first token comes first: always in documents, which no template begins."""
        return not self.template.own_start or any(message.role == "document" for message in record.messages)

    def _rendered(self, record: Record) -> list[Piece]:
        """The pieces of the whole record; refuses one with a blank answer, which would teach to answer nothing."""
        for index, message in enumerate(record.messages):
            # A blank answer that is one of the options is a choice like the others.
            if message.role == "assistant" and is_blank(message) and message.text not in record.options:
                raise RecordError("empty_answer", f"messages[{index}], an answer, holds neither text nor a picture")
        return self.template.render(record.messages, self._eos)

    def _add_image(self, sample: Sample, image: Image, folder: Path, videos: Videos) -> None:
        for name, prepared in self.prepared.items():
            sample.features.setdefault(name, []).append(prepared.features(image, folder, videos))
        for name, wanted in self.spec.known.items():
            sample.features.setdefault(name, []).append(_known(image, wanted))
        made, size = self._look(image, folder, videos)
        tiling = self._tiling(image, size, folder)
        for name, pixels in made.items():
            if name == ENCODER:
                sample.images.append(pixels)
                grid = self.spec.grid(pixels.shape[1], pixels.shape[2], tiling)
            else:
                sample.teacher_images.setdefault(name, []).append(pixels)
        if ENCODER in self.prepared:
            grid = self.spec.grid_of(sample.features[ENCODER][-1][1], tiling)
        sample.tilings.append(tiling)
        sample.image_starts.append(len(sample.ids))
        sample.grids.append(grid)
        sample.ids += [0] * grid.num_tokens
        sample.labels += [IGNORE] * grid.num_tokens

    def pixels(self, image: Image, folder: Path, videos: Videos | None = None) -> dict[str, Tensor]:
        """uint8 `[3, h, w]` of an image for the encoder and for each teacher, where no features were prepared.

        Args:
            image: the image.
            folder: what its path is relative to.
            videos: keeps a video open for its next frame.

        Raises:
            RecordError: as `open_image`.
            ValueError: for a transform that does not go with the encoder or teacher.
        """
        return self._look(image, folder, videos)[0]

    def _look(self, image: Image, folder: Path, videos: Videos | None) -> tuple[dict[str, Tensor], Size | None]:
        """What `pixels` returns, and (width, height) of the picture; None where it was not opened."""
        wanted = {ENCODER: self.spec.pixels} | self.spec.teacher_pixels
        missing = {name: pixels for name, pixels in wanted.items() if name not in self.prepared}
        if not missing:
            return {}, None
        picture, size = decode_image(image, folder, self._scale if self.fast_jpeg else None, videos)
        return {name: self._transform(name, pixels)(picture, pixels, size) for name, pixels in missing.items()}, size

    def _tiling(self, image: Image, size: Size | None, folder: Path) -> Tiling | None:
        """How the tiles of an image make it up; its `size` (width, height) is read from its file where it is None.

        None where no embedder asks, so that no header is read for nothing.
        """
        if self.spec.tile_map is as_they_come or self.transform.fixed(self.spec.pixels):
            return None
        return self.transform.tiling(image_size(image, folder) if size is None else size)

    def _transform(self, name: str, pixels: PixelSpec) -> ImageTransform:
        """How a picture is resized: for the encoder by `transform`, for a teacher by `transform_for`."""
        return self.transform if name == ENCODER else transform_for(pixels, self.transform)

    def preprocessing(self) -> str:
        """How pictures are decoded and resized, as text: besides the network, this decides prepared features."""
        wanted = [(name, self.spec.teacher_pixels[name]) for name in sorted(self.spec.teacher_pixels)]
        return f"{describe(self.transform)} fast_jpeg={self.fast_jpeg} encoder={self.spec.pixels} teachers={wanted}"

    def _scale(self, size: Size) -> float:
        """Factor by which a picture of this (width, height) is resized where most of it is kept: encoder or teacher."""
        spec = self.spec
        others = spec.teacher_pixels.values() if spec.decoded_for is None else spec.decoded_for
        wanted = (transform_for(pixels, self.transform).scale(size, pixels) for pixels in others)
        return max([self.transform.scale(size, spec.pixels), *wanted])

    def measure(self, record: Record, source: Source) -> tuple[int, int]:
        """Number of positions and of images of a sample, without decoding an image.

        Positions are an upper bound: a sample that is cut at an image may come out shorter.

        Args:
            record: of the source.
            source: gives the image folder.

        Raises:
            RecordError: as encoding does, as far as it can be known without pixels.
        """
        parts = documents_of(record)
        if len(parts) > 1:
            sizes = [self.measure(part, source) for part in parts]
            return sum(length for length, _ in sizes), sum(images for _, images in sizes)
        record = self._with_fitting_frames(record, source.image_folder)
        length = self._length(record, source.image_folder)
        if length > self.max_length and self.too_long == "drop":
            raise RecordError("too_long", f"{length} positions, max_length is {self.max_length}")
        return min(length, self.max_length), len(record.images)

    def _image_tokens(self, image: Image, folder: Path) -> int:
        fixed = self.transform.fixed(self.spec.pixels)
        return self.tokens_of((1, 1) if fixed else image_size(image, folder))

    def tokens_of(self, size: Size) -> int:
        """Number of visual tokens of an image of this (width, height) in pixels.

        Raises:
            ValueError: as `InputSpec.grid`, and for a transform that does not go with the encoder.
        """
        width, height = self.transform.size(size, self.spec.pixels)
        return self.spec.grid(height, width, self.transform.tiling(size)).num_tokens

    def measure_key(self) -> str:
        """What the result of `measure` depends on besides the record, as text."""
        tokenizer = hashlib.sha256(self.spec.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        sides = [self.spec.pixels.multiple * factor for factor in (1, 2, 3, 8)]
        sides = [self.spec.pixels.size] if self.spec.pixels.size else sides
        grids = [self.spec.grid(height, width) for height in sides for width in sides]
        how = f"{describe(self.template)} {describe(self.transform)} {self.spec.pixels} {grids}"
        if self.transform.tiling((1, 1)) is not None:  # then the embedder may put tiles together
            how += f" {[self.tokens_of(size) for size in ((1, 1), (2, 1), (1, 2))]}"
        return f"{tokenizer} {how} {self.max_length} {self.too_long}"

    def _fit(self, sample: Sample) -> None:
        """Cut the sample to `max_length`; an image that would be cut is removed whole, with all that follows it."""
        length = len(sample)
        if length <= self.max_length:
            return
        detail = f"{length} positions, max_length is {self.max_length}"
        if self.too_long == "drop":
            raise RecordError("too_long", detail)
        end = self.max_length
        for index, (start, grid) in enumerate(zip(sample.image_starts, sample.grids, strict=True)):
            if start + grid.num_tokens > end:
                end = min(end, start)
                detail += f"; {len(sample.grids) - index} of {len(sample.grids)} images cut off"
                for images in (sample.images, *sample.teacher_images.values()):
                    del images[index:]
                for features in sample.features.values():
                    del features[index:]
                del sample.image_starts[index:], sample.grids[index:], sample.tilings[index:]
                break
        del sample.ids[end:], sample.labels[end:]
        sample.note = BadSample(sample.id, sample.source, "truncated", detail, dropped=False)
