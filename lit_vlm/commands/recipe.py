"""Recipes: a system, its stages in order, the axes it can be run along, and the recipe it differs from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import lit_vlm
from lit_vlm.core.plugins import nearest

SHIPPED = Path(lit_vlm.__file__).parent.parent / "recipes"
"""Folder of the shipped recipes: beside the package, in a checkout and in an installed wheel."""
SYSTEM = ("model", "stages", "{stage}")
SCALE = ("scales/{scale}", "scales/{scale}/{stage}")
"""Files of a recipe in the order in which they are read, without `.yaml`."""


@dataclass(frozen=True)
class Recipe:
    """A recipe: the content of `recipe.yaml` in its folder.

    Attributes:
        folder: folder of the recipe.
        stages: names of stage files in order, without `.yaml`.
        scale: the scale that is used when none is named.
        strategy: the strategy that is used when none is named.
        strategies: scale → the strategy that is used when none is named, where it is another.
        starts: stage → the stage whose weights it starts from, where that is not the one before it.
        skip: scale → stages that are left out there unless they are asked for.
        next: commands to try after a run.
        plugins: modules whose classes its files may name by bare names.
        base: the recipe that this one builds on; its files are read first.
        in_base: stage → its name in the base, where it is another.
        without: files of the base that are not read, without `.yaml`.
    """

    folder: Path
    stages: tuple[str, ...]
    scale: str | None = None
    strategy: str = "single"
    strategies: Mapping[str, str] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    skip: Mapping[str, Sequence[str]] = field(default_factory=dict)
    next: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    about: str = field(default="", compare=False)
    base: Recipe | None = None
    in_base: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def scales(self) -> list[str]:
        """The scales that this recipe has, those of its base among them."""
        own = {path.stem for path in (self.folder / "scales").glob("*.yaml")}
        inherited = {
            scale for scale in (self.base.scales if self.base else ()) if f"scales/{scale}" not in self.without
        }
        return sorted(own | inherited)

    def has(self, name: str) -> bool:
        """Whether this recipe or its base has a file; the name is without `.yaml`."""
        return (self.folder / f"{name}.yaml").is_file() or (self.base is not None and self.base.has(name))

    def strategy_for(self, scale: str | None) -> str:
        """The strategy of a scale when none is named."""
        return self.strategies.get(scale or "", self.strategy)

    def stages_for(self, scale: str | None) -> list[str]:
        """The stages that are run at a scale when none are named."""
        return [stage for stage in self.stages if stage not in self.skip.get(scale or "", ())]

    def start_of(self, stage: str, stages: Sequence[str]) -> str | None:
        """The stage among those that are run whose weights this one starts from; None for the first."""
        before = stages[: stages.index(stage)]
        named = self.starts.get(stage)
        return named if named in before else before[-1] if before else None

    def statistics(self, stage: str) -> list[tuple[Path, str]]:
        """Files that may hold statistics of a stage's published data, nearest first, and the stage's name in each."""
        own = [(self.folder / "statistics.yaml", stage)]
        return own + (self.base.statistics(self.in_base.get(stage, stage)) if self.base is not None else [])

    def configs(self, stage: str, scale: str | None, strategy: str) -> list[Path]:
        """The config files of one stage: system, stage, scale, strategy; later ones win.

        Settings of all stages may stand in `stages.yaml`, and those of one stage at a scale in
        `scales/SCALE/STAGE.yaml`. Each file of the base comes before the recipe's own file of that kind, so that the
        base's scale follows this recipe's stage. Settings of a scale for several recipes may stand in
        `scales/SCALE.yaml` beside their folders.

        Raises:
            ValueError: for an unknown stage, scale or strategy, naming those that exist, or a missing file.
        """
        if stage not in self.stages:
            raise ValueError(
                f"recipe '{self.name}' has no stage '{stage}'{nearest(stage, self.stages)}; stages: "
                f"{', '.join(self.stages)}"
            )
        files = self._files(SYSTEM, stage)
        for needed in ("model", "{stage}"):
            if not self._files((needed,), stage):
                raise ValueError(f"recipe '{self.name}' lacks {self.folder / needed.format(stage=stage)}.yaml")
        if scale is not None:
            if scale not in self.scales:
                raise ValueError(
                    f"recipe '{self.name}' has no scale '{scale}'{nearest(scale, self.scales)}; scales: "
                    f"{', '.join(self.scales) or 'none'}"
                )
            files += self._shared(scale) + self._files(SCALE, stage, scale)
        return [*files, self._strategy(strategy)]

    def _strategy(self, name: str) -> Path:
        """The file of a strategy: beside this recipe, else beside its bases, else among the shipped ones."""
        folders = [self.folder.parent / "strategies", SHIPPED / "strategies"]
        base = self.base
        while base is not None:
            folders.insert(-1, base.folder.parent / "strategies")
            base = base.base
        files = [folder / f"{name}.yaml" for folder in folders]
        if (found := next((file for file in files if file.is_file()), None)) is not None:
            return found
        known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        raise ValueError(f"there is no strategy '{name}'{nearest(name, known)}; strategies: {', '.join(known)}")

    def _files(self, names: Sequence[str], stage: str, scale: str | None = None) -> list[Path]:
        """Paths of the files of these names that exist, the base's first."""
        files: list[Path] = []
        if self.base is not None:
            there = self.in_base.get(stage, stage)
            kept = [name for name in names if not self._leaves_out(name.format(stage=there, scale=scale))]
            files += self.base._files(kept, there, scale)
        own = [self.folder / f"{name.format(stage=stage, scale=scale)}.yaml" for name in names]
        return files + [file for file in own if file.is_file()]

    def _leaves_out(self, name: str) -> bool:
        return any(name == left or name.startswith(f"{left}/") for left in self.without)

    def _shared(self, scale: str) -> list[Path]:
        """Files of the scale that all recipes beside this one, or beside its bases, share."""
        inherited = self.base is not None and not self._leaves_out(f"scales/{scale}")
        files = self.base._shared(scale) if self.base is not None and inherited else []
        own = self.folder.parent / "scales" / f"{scale}.yaml"
        known = {file.resolve() for file in files}
        return files + ([own] if own.is_file() and own.resolve() not in known else [])


def find_recipe(name: str) -> Recipe:
    """A recipe by its folder, or by its name in ./recipes or among the shipped ones.

    Raises:
        ValueError: for an unknown recipe, naming those that exist, or a wrong key of recipe.yaml.
    """
    for folder in (Path(name), Path("recipes") / name, SHIPPED / name):
        if (folder / "recipe.yaml").is_file():
            return _read(folder)
    names = shipped_recipes()
    raise ValueError(f"there is no recipe '{name}'{nearest(name, names)}; recipes: {', '.join(names)}")


def shipped_file(name: str) -> Path:
    """A file by its path, or where there is none, by that among the shipped recipes: `recipes/eve/ablations/...`."""
    path = Path(name)
    shipped = SHIPPED.parent / path
    is_shipped = not path.is_absolute() and path.parts[:1] == (SHIPPED.name,) and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the kit."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/recipe.yaml"))


def _read(folder: Path, above: Sequence[Path] = ()) -> Recipe:
    """Read the recipe in a folder; raises as `find_recipe` does.

    Args:
        folder: the folder.
        above: folders of the recipes that this one is a base of, to find circles.
    """
    file = folder / "recipe.yaml"
    raw: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"{file} needs a list 'stages', or a 'base'")
    known = {
        "about",
        "base",
        "stages",
        "scale",
        "strategy",
        "strategies",
        "starts",
        "skip",
        "without",
        "next",
        "plugins",
    }
    if unknown := set(raw) - known:
        raise ValueError(f"{file} has unknown keys {sorted(unknown)}; known: {', '.join(sorted(known))}")
    base = _base(file, raw.get("base"), [*above, folder])
    given = raw.get("stages") or (base.stages if base else None)
    if not isinstance(given, list | tuple | dict):
        raise ValueError(f"{file} needs a list 'stages', or a 'base' whose stages it has")
    stages = tuple(str(stage) for stage in given)
    return Recipe(
        folder=folder,
        stages=stages,
        scale=raw.get("scale", base.scale if base else None),
        strategy=raw.get("strategy", base.strategy if base else "single"),
        strategies={**(base.strategies if base else {}), **(raw.get("strategies") or {})},
        starts=_starts(file, stages, raw.get("starts"), base),
        skip=raw["skip"] or {} if "skip" in raw else base.skip if base else {},
        next=tuple(raw.get("next", ())),
        plugins=tuple(raw.get("plugins") or ()),
        about=raw.get("about", ""),
        base=base,
        in_base=_in_base(file, given, base),
        without=_without(file, raw.get("without") or (), base),
    )


def _base(file: Path, name: str | None, below: Sequence[Path]) -> Recipe | None:
    """The recipe that `base` names: a folder beside this one, a path from this one's folder, or a shipped recipe."""
    if name is None:
        return None
    for folder in (file.parent.parent / name, file.parent / name, SHIPPED / name):
        if (folder / "recipe.yaml").is_file():
            break
    else:
        known = shipped_recipes()
        raise ValueError(
            f"{file}: there is no recipe '{name}' for a base{nearest(name, known)}; recipes: {', '.join(known)}"
        )
    if any(folder.resolve() == one.resolve() for one in below):
        names = " → ".join(one.resolve().name for one in [*below, folder])
        raise ValueError(f"{file}: base leads back to where it began: {names}")
    return _read(Path(os.path.normpath(folder)), below)


def _in_base(file: Path, given: Any, base: Recipe | None) -> dict[str, str]:
    if not isinstance(given, dict):
        return {}
    names = {str(stage): str(name) for stage, name in given.items()}
    for stage, name in names.items():
        if base is None or name not in base.stages:
            raise ValueError(
                f"{file}: stages says '{stage}: {name}', and '{name}' is no stage of the base; "
                f"its stages: {', '.join(base.stages) if base else 'none, as there is no base'}"
            )
    return names


def _without(file: Path, given: Sequence[str], base: Recipe | None) -> tuple[str, ...]:
    for name in given:
        if base is None or not base.has(name):
            raise ValueError(
                f"{file}: without names '{name}', and the base has no {name}.yaml; "
                f"write model, stages, a stage, scales/SCALE or scales/SCALE/STAGE"
            )
    return tuple(given)


def _starts(file: Path, order: Sequence[str], given: Mapping[str, str] | None, base: Recipe | None) -> dict[str, str]:
    if given is None and base is not None:  # as far as its stages are stages here
        return {stage: other for stage, other in base.starts.items() if {stage, other} <= set(order)}
    for stage, other in (given or {}).items():
        if stage not in order or other not in order[: order.index(stage)]:
            raise ValueError(f"{file}: starts says '{stage}: {other}'; both must be stages, the second an earlier one")
    return dict(given or {})
