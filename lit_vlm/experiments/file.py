"""The file of an ablation: a recipe, variants of its flags, seeds, scores, and claims to be judged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from lit_vlm.core.plugins import nearest
from lit_vlm.core.settings import checked, read_mapping
from lit_vlm.experiments.asked import Evaluation, Probing, Strict, refuse_doubles

BASE = "base"
"""Name of the variant that has the flags for all, and no other."""
SEED = "seed_everything"
NAME = re.compile(r"[A-Za-z0-9][\w.,=+-]*")
"""Names of variants, which are names of folders."""
Flags = Mapping[str, Any]


class Claim(Strict):
    """What is to be judged: that one variant is better than another.

    Attributes:
        text: the claim in words, with its source.
        better: the variant that is said to be better.
        worse: the other one.
        score: name of the score, such as `held_out/accuracy` or `scenes/0-shot/accuracy`.
    """

    text: str
    better: str
    worse: str
    score: str


class _Axes(Strict):
    """What a variant may have of its own besides flags."""

    recipe: str
    scale: str | None
    strategy: str | None
    stages: tuple[str, ...] | None


class AblationFile(Strict):
    """What an ablation runs, compares and judges.

    Attributes:
        about: one sentence.
        source: what it is after: paper and table.
        recipe: name or folder of the recipe.
        scale: its scale; default: the recipe's.
        strategy: how it is sharded; default: the recipe's.
        stages: which stages; default: the recipe's.
        seeds: seeds of every variant; a number stands for 0, 1, ...
        sequential: whether seeds are added one by one, until every claim is decided.
        base: flags of all variants, as for `lit-vlm run` without dashes: name → value.
        variants: name → flags; `recipe`, `scale`, `strategy` and `stages` among them replace those above.
        grid: flag → values, or names → values; each combination is a variant.
        evaluate: what the last stage of each run is asked, besides what it leaves by itself.
        probe: what is read from the layers of the last stage of each run.
        claims: what is judged; without, the report compares each variant with the base.
    """

    about: str = ""
    source: str = ""
    recipe: str
    scale: str | None = None
    strategy: str | None = None
    stages: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    base: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, dict[str, Any]] = Field(default_factory=dict)
    sequential: bool = False
    evaluate: tuple[Evaluation, ...] = ()
    probe: tuple[Probing, ...] = ()
    claims: tuple[Claim, ...] = ()

    @field_validator("seeds", mode="before")
    @classmethod
    def _numbered(cls, seeds: Any) -> Any:
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            if seeds < 1:
                raise ValueError("at least one seed is needed")
            return tuple(range(seeds))
        return seeds or None

    @field_validator("seeds")
    @classmethod
    def _told_apart(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        if any(seed < 0 for seed in seeds):
            raise ValueError("a seed is a number from 0 on")
        return seeds

    @field_validator("base", mode="before")
    @classmethod
    def _without(cls, given: Any) -> Any:
        return {} if given is None else given

    @field_validator("variants", mode="before")
    @classmethod
    def _empty(cls, given: Any) -> Any:
        """Let a variant without flags be written as a name alone."""
        if not isinstance(given, dict):
            return given or {}
        return {name: {} if flags is None else flags for name, flags in given.items()}

    @field_validator("grid", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Give the values of a list their names."""
        if not isinstance(given, dict):
            return given or {}
        return {flag: _names(flag, values) for flag, values in given.items()}

    @model_validator(mode="after")
    def _agree(self) -> AblationFile:
        for name in self.variants:
            if name == BASE:
                raise ValueError(f"variants: '{BASE}' is the variant with no flags of its own; its flags are base's")
            if not NAME.fullmatch(name):
                raise ValueError(f"variants: {name!r} is a folder's name, too: letters, digits and . , = + - _")
        for where, flags in (("base", self.base), *((f"variants.{name}", one) for name, one in self.variants.items())):
            _check_flags(where, flags)
        _check_flags("grid", self.grid)
        refuse_doubles(self.evaluate, self.probe)
        names = [variant.name for variant in self.all_variants()]
        if double := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two variants are called {double[0]}")
        self._check_claims(names)
        return self

    def _check_claims(self, variants: Sequence[str]) -> None:
        if self.sequential and (not self.claims or len(self.seeds) < 2):
            raise ValueError("sequential: seeds are added until claims are decided: add claims, and two seeds or more")
        for claim in self.claims:
            for side in (claim.better, claim.worse):
                if side not in variants:
                    near, known = nearest(side, variants), ", ".join(variants)
                    raise ValueError(f"claims: there is no variant '{side}'{near}; variants: {known}")
            if claim.better == claim.worse:
                raise ValueError(f"claims: {claim.text!r} compares {claim.better} with itself")

    def all_variants(self) -> list[Variant]:
        """The variants in order: the base, those that have a name, those of the grid.

        Where there is a grid alone, the base is among them only if a claim names it.
        """
        found = [self._variant(name, flags) for name, flags in self.variants.items()]
        found += [self._variant(name, flags) for name, flags in _combinations(self.grid)]
        named = any(BASE in (claim.better, claim.worse) for claim in self.claims)
        return [self._variant(BASE, {}), *found] if self.variants or not self.grid or named else found

    def _variant(self, name: str, own: Flags) -> Variant:
        flags = {**self.base, **own}
        axes = _Axes(**{key: flags.get(key, getattr(self, key)) for key in _Axes.model_fields})
        words = flag_words({key: value for key, value in flags.items() if key not in _Axes.model_fields})
        return Variant(name, axes.recipe, axes.scale, axes.strategy, axes.stages, tuple(words))


@dataclass(frozen=True)
class Variant:
    """A variant as a command of `lit-vlm run`: its axes, and its flags without the seed."""

    name: str
    recipe: str
    scale: str | None
    strategy: str | None
    stages: tuple[str, ...] | None
    flags: tuple[str, ...]


def read_file(path: Path) -> AblationFile:
    """Read an ablation.

    Raises:
        ValueError: for a file that is missing or no YAML, an unknown key or a wrong value, naming file and key.
    """
    return checked(AblationFile, read_mapping(path, "keys of an ablation, such as 'recipe: eve'"), str(path))


def flag_words(flags: Flags) -> list[str]:
    """Flags as words of a command: null, true and false as YAML writes them, mappings and lists as JSON."""
    words: list[str] = []
    for name, value in flags.items():
        plain = isinstance(value, str)
        words += [f"--{name}", value if plain else json.dumps(value)]
    return words


def _check_flags(where: str, flags: Flags) -> None:
    for name in flags:
        if name.startswith("-"):
            raise ValueError(f"{where}: write {name.lstrip('-')!r} without dashes")
        if name.rpartition(".")[2] == SEED:
            raise ValueError(f"{where}: {name} is the seed of each run: name the seeds by the key 'seeds'")
        if name.rpartition(".")[2] in ("default_root_dir", "start_from", "ckpt_path", "out"):
            raise ValueError(f"{where}: {name} is what an ablation sets itself, for each stage that it runs")


def _combinations(grid: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and flags of each combination of a grid's values."""
    if not grid:
        return
    short = short_names(list(grid))
    for values in product(*(one.items() for one in grid.values())):
        name = ",".join(f"{short[flag]}={label}" for flag, (label, _) in zip(grid, values, strict=True))
        yield name, {flag: value for flag, (_, value) in zip(grid, values, strict=True)}


def short_names(flags: Sequence[str]) -> dict[str, str]:
    """Flag → as many of its last parts as tell it from the others."""
    found = {}
    for flag in flags:
        parts = flag.split(".")
        others = [other.split(".") for other in flags if other != flag]
        count = next(
            n for n in range(1, len(parts) + 1) if n == len(parts) or all(parts[-n:] != o[-n:] for o in others)
        )
        found[flag] = ".".join(parts[-count:])
    return found


def _names(flag: str, values: Any) -> dict[str, Any]:
    if isinstance(values, dict) and values:
        named = {str(label): value for label, value in values.items()}
    elif isinstance(values, list) and values:
        labels = [_label(value) for value in values]
        if None in labels:
            raise ValueError(f"{flag}: give values that are mappings or lists a name each: {{small: {{...}}, ...}}")
        if len(set(labels)) < len(labels):
            raise ValueError(f"{flag}: a value is there twice")
        named = dict(zip(map(str, labels), values, strict=True))
    else:
        raise ValueError(f"{flag}: give a list of values, or names and values")
    if bad := [label for label in named if not re.fullmatch(r"[\w.,=+-]+", label)]:
        raise ValueError(
            f"{flag}: {bad[0]!r} is a part of a folder's name: letters, digits and . , = + - _; name the value"
        )
    return named


def _label(value: Any) -> str | None:
    """A name for a value: the last part of a class path, or the value as YAML writes it; None for nested ones."""
    if isinstance(value, dict | list):
        return None
    if isinstance(value, str):
        return value.rpartition(".")[2] if re.fullmatch(r"[A-Za-z_][\w.]*", value) else value.replace("/", "-")
    return f"{value:g}" if isinstance(value, float) else str(json.dumps(value))
