"""Vectors of pictures and of their texts by a dual encoder, as measures that steps share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.device import DeviceMeasure
from lit_vlm.data.curation.dual_encoder import DualEncoder, Inputs
from lit_vlm.data.curation.step import Sample
from lit_vlm.data.records import Image, Message, Record, Text

VECTOR = "vector"


class Embeddings(DeviceMeasure):
    """Unit vectors of pictures or of what belongs to them, in fp16.

    Args:
        encoder: gives the vectors.
    """

    level: ClassVar[Literal["record", "picture"]] = "picture"

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    @property
    def columns(self) -> Mapping[str, np.dtype[Any]]:
        """One column of vectors; asking for it loads the model."""
        return {VECTOR: np.dtype((np.float16, (self.encoder.width,)))}

    def on(self, device: str) -> Self:
        """The same measure, with its model on a device."""
        return type(self)(self.encoder.on(device))


class PictureEmbeddings(Embeddings):
    """The unit vector of each picture."""

    def ready(self, samples: Sequence[Sample]) -> Inputs:
        """All pictures as the model takes them."""
        return self.encoder.picture_inputs([picture for sample in samples for picture in sample.pictures])

    def compute(self, ready: Inputs) -> Mapping[str, NDArray[Any]]:
        """Their vectors `[p, width]`."""
        return {VECTOR: self.encoder.embed(ready).astype(np.float16)}


class TextEmbeddings(Embeddings):
    """The unit vector of each picture's text (`texts_of`); zeros where it has none."""

    def ready(self, samples: Sequence[Sample]) -> tuple[Inputs | None, NDArray[np.int64]]:
        """Ids of the different texts, and which of them each picture has; -1 for none."""
        texts = [text for sample in samples for text in texts_of(sample.record)]
        different = {text: number for number, text in enumerate(dict.fromkeys(text for text in texts if text))}
        which = np.array([different.get(text, -1) for text in texts], np.int64)
        return (self.encoder.text_inputs(list(different)) if different else None), which

    def compute(self, ready: tuple[Inputs | None, NDArray[np.int64]]) -> Mapping[str, NDArray[Any]]:
        """The vectors of the pictures' texts `[p, width]`."""
        inputs, which = ready
        nothing = np.zeros((1, self.encoder.width), np.float16)
        vectors = self.encoder.embed(inputs).astype(np.float16) if inputs is not None else nothing[:0]
        return {VECTOR: np.concatenate([vectors, nothing])[which]}


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Stored vectors `[n, width]` in fp32 and with length 1, which those in fp16 have only about."""
    full = vectors.astype(np.float32)
    found: NDArray[np.float32] = full / np.maximum(np.linalg.norm(full, axis=1, keepdims=True), 1e-12)
    return found


def texts_of(record: Record) -> list[str]:
    """The text that belongs to each picture of a record; "" for a picture without one.

    In a document it is the text behind the picture, up to the next one that has some text behind it; behind the last
    picture there may be none, and then it is the text in front. In a conversation it is what the assistant says, for
    all pictures: captions, and not the request for one.
    """
    said = " ".join(message.text.strip() for message in record.messages if message.role == "assistant").strip()
    found: list[str] = []
    for message in record.messages:
        pictures = sum(isinstance(part, Image) for part in message.content)
        found += _in_document(message) if message.role == "document" else [said] * pictures
    return found


def _in_document(message: Message) -> list[str]:
    """The text behind each picture, or in front of those behind which there is none."""
    found: list[str] = []
    before, waiting = "", 0
    for part in message.content:
        if isinstance(part, Image):
            waiting += 1
        elif isinstance(part, Text) and part.text.strip():
            before = part.text.strip()
            found += [before] * waiting
            waiting = 0
    return found + [before] * waiting
