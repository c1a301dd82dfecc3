"""What the published data of a stage look like, where the data themselves are not at hand.

A recipe states it in `statistics.yaml` beside its stages: for each stage and each source of `data.train`, how many
records there are, and of what kinds they are. docs/recipes.md describes the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lit_vlm.core.plugins import nearest

FILE = "statistics.yaml"
KNOTS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Shares of records at which the length of a text is known or made up from its neighbours."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextTokens(_Part):
    """The distribution of text tokens of a sequence, marks and template included, visual tokens not.

    Attributes:
        quantiles: the lengths that 5, 25, 50, 75 and 95 % of the sequences do not exceed.
        mean: the mean; it decides how long the longest 5 % are. Default: by the quantiles.
        most: the longest, in place of `mean`.
    """

    quantiles: tuple[float, float, float, float, float]
    mean: float | None = None
    most: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.quantiles) != sorted(self.quantiles) or self.quantiles[0] < 1:
            raise ValueError(f"quantiles rise and are at least 1, unlike {list(self.quantiles)}")
        if self.mean is not None and self.most is not None:
            raise ValueError("mean and most exclude each other, as each decides how long the longest texts are")
        if self.values[-1] < self.quantiles[-1]:
            lowest = self._mean_with(self.quantiles[-1])
            said = f"mean {self.mean:g}, at least {lowest:g} by the quantiles" if self.mean else f"most {self.most:g}"
            raise ValueError(f"{said}: the longest text would be shorter than the last quantile")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """The lengths at `KNOTS`, between which the distribution is linear."""
        fourth, fifth = self.quantiles[-2:]
        if self.most is not None:
            top = self.most
        elif self.mean is not None:  # the last stretch is linear, so its mean is that of its ends
            top = fifth + (self.mean - self._mean_with(fifth)) / (0.5 * (KNOTS[-1] - KNOTS[-2]))
        else:
            top = fifth + (fifth - fourth) / 4
        return (self._least, *self.quantiles, top)

    @property
    def _least(self) -> float:
        return max(1.0, self.quantiles[0] - (self.quantiles[1] - self.quantiles[0]) / 4)

    def _mean_with(self, top: float) -> float:
        values = np.array((self._least, *self.quantiles, top))
        return float(np.sum(np.diff(KNOTS) * (values[1:] + values[:-1]) / 2))

    def at(self, shares: NDArray[np.float64]) -> NDArray[np.int64]:
        """The lengths that these shares of sequences do not exceed: `[n]` → `[n]`."""
        return np.maximum(1, np.round(np.interp(shares, KNOTS, self.values))).astype(np.int64)


class Size(NamedTuple):
    """A typical size of pictures.

    Attributes:
        width: in pixels.
        height: in pixels.
        share: of the pictures of a group.
    """

    width: int
    height: int
    share: float


class Group(_Part):
    """Records of one kind within a source.

    Attributes:
        what: which records these are.
        share: of the source's records.
        pictures: pictures of a sequence; of a list, each number is equally frequent.
        text_tokens: lengths of the texts.
        supervised: share of the text tokens that carry a loss.
        sizes: `WIDTHxHEIGHT` → share of the pictures.
        form: whether a record is a conversation in a template or a bare document.
        estimated: why, where numbers of this group are estimates and not published.
    """

    what: str
    share: float = Field(default=1.0, gt=0, le=1)
    pictures: int | tuple[int, ...]
    text_tokens: TextTokens
    supervised: float = Field(gt=0, le=1)
    sizes: Mapping[str, float] = Field(default_factory=dict)
    form: Literal["conversation", "document"] = "conversation"
    estimated: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.counts or min(self.counts) < 0:
            raise ValueError(f"pictures is a number or a list of numbers from 0 on, not {self.pictures}")
        if bool(self.sizes) != bool(max(self.counts)):
            raise ValueError("sizes are given where there are pictures, and only there")
        if self.sizes and abs(sum(self.sizes.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of sizes add up to {sum(self.sizes.values()):g} instead of 1")
        _ = self.picture_sizes  # raises for a size that is written in another way
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of pictures of a sequence, equally frequent."""
        return (self.pictures,) if isinstance(self.pictures, int) else self.pictures

    @property
    def picture_sizes(self) -> list[Size]:
        """The typical sizes of pictures.

        Raises:
            ValueError: for a size that is not written as `WIDTHxHEIGHT`.
        """
        found = []
        for text, share in self.sizes.items():
            width, _, height = text.partition("x")
            if not (width.isdecimal() and height.isdecimal()):
                raise ValueError(f"a size is written WIDTHxHEIGHT, as 640x480, not '{text}'")
            found.append(Size(int(width), int(height), share))
        return found


class SourceStatistics(_Part):
    """The records of one source.

    Attributes:
        records: how many are trained on in an epoch.
        source: where these numbers are published.
        sequences: sequences of a record, each of which is like `groups` say.
        groups: the kinds of records.
    """

    records: int = Field(gt=0)
    source: str
    sequences: int = Field(default=1, gt=0)
    groups: tuple[Group, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(group.share for group in self.groups)
        if abs(total - 1) > 0.005:
            raise ValueError(f"the shares of groups add up to {total:g} instead of 1")
        if self.sequences > 1 and any(group.form != "document" for group in self.groups):
            raise ValueError("several sequences of a record are documents: set form: document")
        return self


Stage = Mapping[str, SourceStatistics]
"""Name of a source in `data.train` → its statistics."""


class _File(_Part):
    """A statistics file: stages, and those of single scales where they differ; `shared` holds YAML anchors alone."""

    shared: Any = None
    stages: Mapping[str, Stage] = Field(default_factory=dict)
    scales: Mapping[str, Mapping[str, Stage]] = Field(default_factory=dict)


def read_statistics(file: Path, stage: str, scale: str | None = None) -> Stage:
    """The statistics of a stage.

    Args:
        file: a statistics file.
        stage: the stage's name in it.
        scale: the scale, as statistics may differ there, by another tokenizer or template.

    Raises:
        ValueError: for a file that cannot be read, a key that is wrong, naming it, or a stage that is not in it.
    """
    content = _read(file)
    found = content.scales.get(scale or "", {}).get(stage) or content.stages.get(stage)
    if not found:
        known = list(content.stages)
        raise ValueError(f"{file} has no stage '{stage}'{nearest(stage, known)}; stages: {', '.join(known)}")
    return found


def find_statistics(candidates: Sequence[tuple[Path, str]], recipe: str) -> tuple[Path, str]:
    """The nearest statistics file that has a stage.

    Args:
        candidates: files that may exist, and the stage's name in each, as `Recipe.statistics` gives them.
        recipe: name of the recipe, for the message.

    Returns:
        the file, and the stage's name in it.

    Raises:
        ValueError: where none has the stage; and as `read_statistics`.
    """
    for file, stage in candidates:
        if file.is_file() and stage in _read(file).stages:
            return file, stage
    file, stage = candidates[0]
    raise ValueError(
        f"neither the data nor statistics of stage '{stage}' of the recipe '{recipe}' are here: set the paths of "
        f"data.train, or describe its records under 'stages' in {file} (docs/recipes.md)"
    )


def _read(file: Path) -> _File:
    raw = _load(file)
    for stages in (raw.get("stages"), *(raw.get("scales") or {}).values()):
        for stage in (stages or {}).values():
            for name, source in (stage or {}).items():
                stage[name] = _resolved(file, source)
    try:
        return _File.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{file}: {where}: {first['msg'].removeprefix('Value error, ')}") from error


def _load(file: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} needs a mapping 'stages', found {type(raw).__name__}")
    return raw


def _resolved(file: Path, source: Any) -> Any:
    """A source's raw statistics; `like: RECIPE/STAGE/SOURCE` takes those of a recipe beside this one, or of this one.

    `RECIPE/STAGE@SCALE/SOURCE` takes those of a scale. Keys beside `like` win over what is found there.
    """
    if not (isinstance(source, dict) and "like" in source):
        return source
    recipe, _, rest = str(source["like"]).partition("/")
    place, _, name = rest.partition("/")
    stage, _, scale = place.partition("@")
    other = file.parent.parent / recipe / FILE
    content = _load(other)
    stages = (content.get("scales") or {}).get(scale) if scale else content.get("stages")
    found = ((stages or {}).get(stage) or {}).get(name)
    if not isinstance(found, dict) or "like" in found:
        raise ValueError(
            f"{file}: like: {source['like']} is no source that {other} describes itself: write RECIPE/STAGE/SOURCE, or "
            "RECIPE/STAGE@SCALE/SOURCE"
        )
    return found | {key: value for key, value in source.items() if key != "like"}
