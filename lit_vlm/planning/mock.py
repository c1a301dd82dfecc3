"""Made-up records that are like the published ones in number, lengths and sizes, in place of data that are not here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.data import Template
from lit_vlm.data.records import Image, Message, Record
from lit_vlm.data.sources import Source
from lit_vlm.data.sources.base import describe
from lit_vlm.planning.expected import TokensOf, longest_group
from lit_vlm.planning.filler import Writer, jpeg
from lit_vlm.planning.statistics import Group, SourceStatistics, read_statistics

DISTINCT = 1024
"""Most records that differ; they come again in other orders."""
VARIANTS = 2
"""Pictures of each size."""


class _Shape(NamedTuple):
    """What decides the text and the pictures of a record.

    Attributes:
        group: number of its group.
        tokens: text tokens of each sequence, template included.
        sizes: (width, height, variant) of the pictures of each sequence.
    """

    group: int
    tokens: tuple[int, ...]
    sizes: tuple[tuple[tuple[int, int, int], ...], ...]


class Mock(Source):
    """Made-up records with the statistics of a published source: lengths of texts, pictures and their sizes.

    Texts are one word again and again, as long as the statistics say under the tokenizer at hand, template included;
    the template's system text is left out and counts as a part of the question. Pictures are JPEG files of noise that
    take as many bytes as photographs. Every record depends on seed and index alone.

    Args:
        statistics: a statistics file (`lit_vlm.planning.statistics`).
        stage: name of the stage in it.
        source: name of the source in that stage.
        scale: scale of the recipe, as some have statistics of their own; null: those of the stage.
        records: number of records.
        seed: another seed gives other lengths and sizes in another order.
        tokenizer: source of the tokenizer, as `load_tokenizer` takes it; the decoder's.
        template: the template of the stage, whose own tokens are a part of the lengths; null: texts alone have them.
        longest: number of a group, from 0; all records are then the longest of that kind, with its largest pictures.

    Raises:
        ValueError: for numbers out of range, a source that the stage lacks; and as `read_statistics`.
    """

    def __init__(
        self,
        statistics: str,
        stage: str,
        source: str,
        scale: str | None = None,
        records: int = 10000,
        seed: int = 0,
        tokenizer: str = "bytes",
        template: Template | None = None,
        longest: int | None = None,
    ) -> None:
        self.statistics, self.stage, self.source, self.scale = statistics, stage, source, scale
        self.records, self.seed, self.tokenizer = records, seed, tokenizer
        self.template, self.longest = template, longest
        found = read_statistics(Path(statistics), stage, scale)
        if source not in found:
            raise ValueError(f"{statistics}: stage '{stage}' has no source '{source}', only {', '.join(found)}")
        self._kind: SourceStatistics = found[source]
        if records < 1:
            raise ValueError(f"Mock: records is at least 1, not {records}")
        if longest is not None and not 0 <= longest < len(self._kind.groups):
            raise ValueError(f"Mock: '{source}' has groups 0 to {len(self._kind.groups) - 1}, not longest: {longest}")
        self.name, self.image_folder = source, Path()

    def __len__(self) -> int:
        return self.records

    def record(self, index: int) -> Record:
        """A made-up record with pictures, the same for the same index."""
        return self._record(index, lambda size: Image(data=jpeg(*size), size=size[:2]))

    def outline(self, index: int) -> Record:
        """The record without the bytes of its pictures; their sizes are there."""
        return self._record(index, lambda size: Image(path=f"{size[0]}x{size[1]}-{size[2]}.jpg", size=size[:2]))

    def fingerprint(self) -> str:
        """A hash of the arguments and the statistics, which decide everything."""
        template = describe(self.template) if self.template is not None else ""
        made = [self._kind.model_dump(), self.records, self.seed, self.tokenizer, template, self.longest]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]

    def repeats(self) -> NDArray[np.int64]:
        """For each record, the index of the first one that differs from it in its id alone: `[n]`."""
        return self._order

    def _record(self, index: int, picture: Callable[[tuple[int, int, int]], Image]) -> Record:
        shape = self._shapes[self._order[index]]
        group = self._kind.groups[shape.group]
        messages: list[Message] = []
        for tokens, sizes in zip(shape.tokens, shape.sizes, strict=True):
            messages += self._writer.sequence(group, tokens, [picture(size) for size in sizes])
        return Record(f"{self.seed}-{index}", self.name, tuple(messages))

    @cached_property
    def _writer(self) -> Writer:
        return Writer(load_tokenizer(self.tokenizer), self.template)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """The number of each record among those that differ; the first of them are in order."""
        count = min(DISTINCT, self.records)
        generator = np.random.default_rng((abs(self.seed), 1))
        rounds = [np.arange(count), *(generator.permutation(count) for _ in range(-(-self.records // count) - 1))]
        return np.concatenate(rounds)[: self.records]

    @cached_property
    def _shapes(self) -> list[_Shape]:
        """The records that differ. Lengths are drawn evenly over the distribution, so few records have its mean."""
        count = min(DISTINCT, self.records)
        generator = np.random.default_rng((abs(self.seed), 2))
        if self.longest is not None:
            return [_longest_shape(self.longest, self._kind)] * count
        counts = _dealt(count, [group.share for group in self._kind.groups])
        shapes = [
            shape
            for number, (group, size) in enumerate(zip(self._kind.groups, counts, strict=True))
            for shape in _shapes_of(number, group, size, self._kind.sequences, generator)
        ]
        return [shapes[i] for i in generator.permutation(count)]


def _shapes_of(number: int, group: Group, count: int, sequences: int, generator: np.random.Generator) -> list[_Shape]:
    """`count` records of a group, whose lengths, pictures and sizes are spread evenly, each in an order of its own."""
    total = count * sequences
    lengths = group.text_tokens.at((generator.permutation(total) + 0.5) / max(1, total))
    pictures = np.resize(np.array(group.counts), total)[generator.permutation(total)]
    sizes = group.picture_sizes
    kinds = np.repeat(np.arange(len(sizes)), _dealt(int(pictures.sum()), [size.share for size in sizes]))
    drawn = iter(generator.permutation(kinds).tolist())
    variants = iter(generator.integers(VARIANTS, size=len(kinds)).tolist())
    shown = [
        tuple((sizes[kind].width, sizes[kind].height, next(variants)) for kind in (next(drawn) for _ in range(wanted)))
        for wanted in pictures.tolist()
    ]
    return [
        _Shape(number, tuple(lengths[at : at + sequences].tolist()), tuple(shown[at : at + sequences]))
        for at in range(0, total, sequences)
    ]


def _longest_shape(number: int, source: SourceStatistics) -> _Shape:
    group = source.groups[number]
    largest = max(group.picture_sizes, key=lambda size: size.width * size.height, default=None)
    pictures = max(group.counts) if largest else 0
    sizes = ((largest.width, largest.height, 0),) * pictures if largest else ()
    tokens = round(group.text_tokens.values[-1])
    return _Shape(number, (tokens,) * source.sequences, (sizes,) * source.sequences)


def _dealt(count: int, shares: list[float]) -> list[int]:
    """`count` things dealt out by shares, in whole numbers; those with the largest rests are rounded up."""
    if not shares:
        return []
    exact = np.array(shares) / sum(shares) * count
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: count - int(whole.sum())]] += 1
    return whole.tolist()


def mock_train(
    statistics: Path,
    stage: str,
    records: int,
    tokenizer: str,
    template: Mapping[str, Any] | None,
    scale: str | None = None,
    seed: int = 0,
    least: int = 1,
) -> dict[str, dict[str, Any]]:
    """The value of `data.train` that puts made-up records in place of every source of a stage.

    Args:
        statistics: a statistics file.
        stage: name of the stage in it.
        records: number of records of all sources; each gets its published share, and at least `least`.
        tokenizer: source of the decoder's tokenizer.
        template: class path and arguments of the template of the stage, as `data.template` has them.
        scale: scale of the recipe.
        seed: another seed gives other records.
        least: number of records of a small source, as far as it has them.

    Raises:
        ValueError: as `read_statistics`.
    """
    found = read_statistics(statistics, stage, scale)
    counts = _dealt(records, [source.records for source in found.values()])
    shared = {"statistics": str(statistics), "stage": stage, "scale": scale, "seed": seed, "tokenizer": tokenizer}
    return {
        name: _config(
            shared | {"source": name, "records": max(1, count, min(least, source.records)), "template": template}
        )
        for (name, source), count in zip(found.items(), counts, strict=True)
    }


def mock_longest(
    statistics: Path,
    stage: str,
    records: int,
    tokenizer: str,
    template: Mapping[str, Any] | None,
    tokens_of: TokensOf,
    max_length: int,
    scale: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The value of `data.train` whose records are all the longest kind of a stage, for its peak of memory.

    Args:
        statistics: a statistics file.
        stage: name of the stage in it.
        records: number of records.
        tokenizer: source of the decoder's tokenizer.
        template: class path and arguments of the template of the stage.
        tokens_of: (width, height) of a picture → its visual tokens, as `SampleEncoder.tokens_of`.
        max_length: most positions of a sequence: `data.max_length`.
        scale: scale of the recipe.

    Raises:
        ValueError: as `read_statistics`.
    """
    found = read_statistics(statistics, stage, scale)
    name, group = longest_group(found, tokens_of, max_length)
    shared = {"statistics": str(statistics), "stage": stage, "scale": scale, "tokenizer": tokenizer}
    made = shared | {"source": name, "records": records, "template": template, "longest": group}
    return {name: _config(made)}


def _config(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"{Mock.__module__}.{Mock.__qualname__}", "init_args": arguments}
