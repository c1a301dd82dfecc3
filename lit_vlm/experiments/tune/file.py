"""The file of a search: a recipe, flags of all trials, ranges of the flags that are searched, and a score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lit_vlm.core.settings import check_keys, checked, read_mapping
from lit_vlm.experiments.results import Better
from lit_vlm.training.trial import PrunerName

OWN = ("default_root_dir", "start_from", "ckpt_path", "out", "resume", "recipe", "scale", "strategy", "stages")
"""Last parts of flags that a search sets itself, or that have keys of their own."""
HELD_OUT = "held_out/"
"""What names of scores begin with that `callbacks.HeldOut` leaves at the end of a stage."""
TRIALS = 20
MOST = 10_000
"""Combinations of a grid at most, as Optuna is told all of them at the beginning."""
EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
Value = str | int | float | bool | None


def _number(value: Any) -> Any:
    """A number that YAML takes for text, such as 1e-5, as a number."""
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


Choice = Annotated[Value, BeforeValidator(_number)]
Bound = Annotated[int | float, BeforeValidator(_number)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Model):
    """The values that a flag may have: from `low` to `high`, or one of `choices`.

    Attributes:
        low: least value; with a whole `high`, all values are whole.
        high: greatest value.
        log: whether small values are as likely as large ones, as learning rates should be.
        step: distance of values from `low` on.
        choices: all values.
    """

    low: Bound | None = None
    high: Bound | None = None
    log: bool = False
    step: Bound | None = None
    choices: tuple[Choice, ...] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices are all values; low, high, log and step are of a range")
            if len(set(map(repr, self.choices))) < max(2, len(self.choices)):
                raise ValueError("choices are two or more different values")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not all(abs(bound) < math.inf for bound in (self.low, self.high, self.step or 0)):
            raise ValueError(f"low, high and step are finite numbers, found {self.low}, {self.high} and {self.step}")
        elif not self.low < self.high:
            raise ValueError(f"low must be less than high, found {self.low} and {self.high}")
        elif self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log goes from a low above 0, and without step")
        elif self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, found {self.step}")
        return self

    @property
    def whole(self) -> bool:
        """Whether all values of the range are whole numbers."""
        return all(isinstance(bound, int) for bound in (self.low, self.high, 1 if self.step is None else self.step))

    @property
    def _apart(self) -> int | float:
        """Distance of values; 0 where there is no end of them."""
        return self.step or (1 if self.whole and not self.log else 0)

    @property
    def count(self) -> int | None:
        """Number of values; None where there is no end of them."""
        if self.choices is not None:
            return len(self.choices)
        assert self.low is not None
        assert self.high is not None
        return math.floor((self.high - self.low) / self._apart + 1e-9) + 1 if self._apart else None

    def values(self) -> list[Value]:
        """All values in order; empty where there is no end of them."""
        if self.choices is not None:
            return list(self.choices)
        assert self.low is not None
        return [round(self.low + self._apart * index, 12) for index in range(self.count or 0)]


class TuneFile(_Model):
    """What a search tries and how it judges.

    Attributes:
        recipe: name or folder of the recipe.
        scale: its scale; default: the recipe's.
        strategy: how it is sharded; default: the recipe's.
        stages: which stages; default: the recipe's.
        base: flags of all trials, as for `lit-vlm run` without dashes: name → value.
        search: flag → the values that it may have.
        score: a metric that the last stage logs, such as `val/loss`, or a score of `callbacks.HeldOut`, such as
            `held_out/accuracy`.
        better: whether a higher or a lower score is the better one.
        trials: how many; default: 20, or all combinations of `grid`.
        sampler: what chooses: `tpe` from what earlier trials have found, `random`, or `grid`, all combinations.
        pruner: what gives trials up: `median`, `hyperband` or `none`.
        startup: for `median`: number of trials that must have come to their end before one is given up.
        seed: of the sampler.
        checkpoints: `best` removes the checkpoints of a trial once another is better; `all` keeps them.
    """

    recipe: str
    scale: str | None = None
    strategy: str | None = None
    stages: tuple[str, ...] | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    search: dict[str, Range]
    score: str
    better: Better
    trials: int | None = Field(default=None, ge=1)
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    pruner: PrunerName = "median"
    startup: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)
    checkpoints: Literal["best", "all"] = "best"

    @model_validator(mode="after")
    def _agree(self) -> TuneFile:
        if not self.search:
            raise ValueError("search: name at least one flag and its values")
        for where, flags in (("base", self.base), ("search", self.search)):
            _check_flags(where, flags)
        if both := [name for name in self.search if name in self.base]:
            raise ValueError(f"{both[0]} is both in base and in search")
        if self.score.startswith(HELD_OUT) and self.pruner != "none":
            raise ValueError(
                f"{self.score} is known at the end alone, so no trial can be given up: set pruner: none, or take a "
                "score such as val/loss"
            )
        endless = [name for name, one in self.search.items() if one.count is None]
        if self.sampler == "grid" and endless:
            raise ValueError(f"sampler grid needs choices, or a step, for {endless[0]}")
        if self.sampler == "grid" and self._combinations > MOST:
            raise ValueError(
                f"sampler grid takes {MOST} combinations at most, found {self._combinations}: choose larger steps, or "
                "another sampler"
            )
        return self

    @property
    def _combinations(self) -> int:
        return math.prod(one.count or 1 for one in self.search.values())

    @property
    def count(self) -> int:
        """Number of trials."""
        if self.sampler != "grid":
            return self.trials or TRIALS
        return min(self.trials or self._combinations, self._combinations)


def _check_flags(where: str, flags: Mapping[str, Any]) -> None:
    for name in flags:
        if name.startswith("-"):
            raise ValueError(f"{where}: write {name.lstrip('-')!r} without dashes")
        if name.rpartition(".")[2] in OWN:
            raise ValueError(f"{where}: {name} is what a search sets itself, or has a key of its own in the file")


def read_file(path: Path) -> TuneFile:
    """Read the file of a search.

    Raises:
        ValueError: for a file that is missing or no YAML, an unknown key or a wrong value, naming file and key.
    """
    content = read_mapping(path, "keys of a search, such as 'recipe: eve'")
    search = content.get("search")
    for name, one in search.items() if isinstance(search, dict) else ():
        if isinstance(one, dict):
            check_keys(f"{path}: search.{name}", one, list(Range.model_fields))
    return checked(TuneFile, content, str(path))
