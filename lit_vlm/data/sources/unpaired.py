"""Images and texts that have nothing to do with each other, in one sequence: the first stage of HoVLE."""

from __future__ import annotations

import hashlib
import random
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.data.records import Content, Image, Message, Record, RecordError, Text
from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.provenance import joined


class Unpaired(Source):
    """The images of one source, each record followed by a text that is drawn from another.

    Args:
        pictures: source of the images; the texts of its records are left out.
        texts: source of the texts; the images of its records are left out.
        seed: another seed draws other texts.
        name: name of the source; default: `unpaired`.

    Raises:
        ValueError: when the source of texts is empty.
    """

    def __init__(self, pictures: Source, texts: Source, seed: int = 0, name: str | None = None) -> None:
        if not len(texts):
            raise ValueError(f"Unpaired: the source of texts, {texts.name}, is empty")
        self.pictures, self.texts, self.seed = pictures, texts, seed
        self.name, self.named = name if name is not None else "unpaired", name is not None
        self.path, self.image_folder = pictures.path, pictures.image_folder
        self.chunked = pictures.chunked
        self.provenance = joined([pictures.provenance, texts.provenance])

    def __len__(self) -> int:
        return len(self.pictures)

    def record(self, index: int) -> Record:
        """A document: the images of one record, then a drawn text.

        Raises:
            RecordError: `no_image` for a record without image; and as both sources.
        """
        drawn = self._drawn(index)
        return self._join(self.pictures.record(index), self.texts.outline(drawn))

    def outline(self, index: int) -> Record:
        """The document without the bytes of its images.

        Raises:
            RecordError: `no_image` for a record without image; and as both sources.
        """
        return self._join(self.pictures.outline(index), self.texts.outline(self._drawn(index)))

    def places(self) -> list[Path | str]:
        """Those of both sources."""
        return [*self.pictures.places(), *self.texts.places()]

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """All indices in random order, as the source of the images shuffles its own."""
        return self.pictures.shuffled(generator)

    def fingerprint(self) -> str:
        """A hash of the fingerprints of both sources and the seed."""
        both = f"{self.pictures.fingerprint()} {self.texts.fingerprint()} {self.seed}"
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    def _drawn(self, index: int) -> int:
        return random.Random(f"{self.seed}-{index}").randrange(len(self.texts))

    def _join(self, picture: Record, text: Record) -> Record:
        images = tuple(part for message in picture.messages for part in message.content if isinstance(part, Image))
        if not images:
            raise RecordError("no_image", f"record {picture.id} of {self.pictures.name} has no image")
        parts = [part.text for message in text.messages for part in message.content if isinstance(part, Text)]
        said = "\n".join(part.strip() for part in parts)
        content: tuple[Content, ...] = (*images, Text(said))
        return Record(picture.id, self.name, (Message("document", content),), urls=picture.urls + text.urls)


class RandomWords(Source):
    """Texts of tokens that are drawn uniformly from a vocabulary.

    Tokens are decoded to a text, which is tokenised again in training. A tokenizer may then join neighbours to another
    token, so tokens are nearly uniform, not exactly.

    Args:
        tokenizer: source of the tokenizer, as `load_tokenizer` takes it; the decoder's.
        length: tokens per text.
        count: number of texts.
        seed: another seed draws other texts.
    """

    def __init__(self, tokenizer: str, length: int = 256, count: int = 1000000, seed: int = 0) -> None:
        self.tokenizer, self.length, self.count, self.seed = tokenizer, length, count, seed
        self.name = "random_words"

    @cached_property
    def _loaded(self) -> Any:
        return load_tokenizer(self.tokenizer)

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> Record:
        """A document of random tokens, the same for the same index.

        Raises:
            ValueError: as `load_tokenizer`.
        """
        special = set(self._loaded.all_special_ids)
        rng = random.Random(f"{self.seed}-{index}")
        ids = [rng.randrange(len(self._loaded)) for _ in range(self.length)]
        text = self._loaded.decode([token for token in ids if token not in special])
        return Record(f"words-{index}", self.name, (Message("document", (Text(text),)),))

    def fingerprint(self) -> str:
        """A hash of the arguments, which decide everything."""
        arguments = f"{self.tokenizer} {self.length} {self.count} {self.seed}"
        return hashlib.sha256(arguments.encode()).hexdigest()[:16]
