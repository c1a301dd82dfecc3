"""Recipes: a system, its stages in order, and the axes it can be run along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import lit_vlm
from lit_vlm.core.plugins import nearest

SHIPPED = Path(lit_vlm.__file__).parent.parent / "recipes"
"""Beside the package, in a checkout as in an installed wheel."""


@dataclass(frozen=True)
class Recipe:
    """What `recipe.yaml` of a folder says.

    Attributes:
        folder: the folder.
        stages: stage files in order, without `.yaml`.
        scale: the scale that is used when none is named.
        strategy: the strategy that is used when none is named.
        strategies: the same for some scales.
        starts: stage → the stage whose weights it starts from, where that is not the one before it.
        skip: scale → stages that are left out there unless they are asked for.
        next: commands to try when it has run.
        plugins: modules whose classes may be named in it by their bare names.
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

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.name

    @property
    def scales(self) -> list[str]:
        """The scales that this recipe has."""
        return sorted(path.stem for path in (self.folder / "scales").glob("*.yaml"))

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

    def configs(self, stage: str, scale: str | None, strategy: str) -> list[Path]:
        """The config files of one stage: system, stage, scale, strategy; later ones win.

        A scale may say something of one stage alone, in `scales/SCALE/STAGE.yaml`.

        Raises:
            ValueError: naming what exists.
        """
        if stage not in self.stages:
            raise ValueError(
                f"recipe '{self.name}' has no stage '{stage}'{nearest(stage, self.stages)}; stages: "
                f"{', '.join(self.stages)}"
            )
        files = [self.folder / "model.yaml", self.folder / f"{stage}.yaml"]
        if scale is not None:
            if scale not in self.scales:
                raise ValueError(
                    f"recipe '{self.name}' has no scale '{scale}'{nearest(scale, self.scales)}; scales: "
                    f"{', '.join(self.scales) or 'none'}"
                )
            files.append(self.folder / "scales" / f"{scale}.yaml")
            own = self.folder / "scales" / scale / f"{stage}.yaml"
            files += [own] if own.exists() else []
        strategies = self.folder.parent / "strategies"
        file = (strategies if strategies.is_dir() else SHIPPED / "strategies") / f"{strategy}.yaml"
        if not file.exists():
            known = sorted(path.stem for path in file.parent.glob("*.yaml"))
            raise ValueError(
                f"there is no strategy '{strategy}'{nearest(strategy, known)}; strategies: {', '.join(known)}"
            )
        files.append(file)
        for path in files:
            if not path.exists():
                raise ValueError(f"recipe '{self.name}' lacks {path}")
        return files


def find_recipe(name: str) -> Recipe:
    """A recipe by its folder, or by its name in ./recipes or among the shipped ones.

    Raises:
        ValueError: naming the recipes there are, or the key of recipe.yaml that is wrong.
    """
    places = [Path(name), Path("recipes") / name, SHIPPED / name]
    for folder in places:
        if (folder / "recipe.yaml").is_file():
            return _read(folder)
    names = shipped_recipes()
    raise ValueError(f"there is no recipe '{name}'{nearest(name, names)}; recipes: {', '.join(names)}")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the kit."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/recipe.yaml"))


def _read(folder: Path) -> Recipe:
    file = folder / "recipe.yaml"
    raw: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = {"about", "stages", "scale", "strategy", "strategies", "starts", "skip", "next", "plugins"}
    if not isinstance(raw, dict) or not isinstance(raw.get("stages"), list) or not raw["stages"]:
        raise ValueError(f"{file} needs a list 'stages'")
    if unknown := set(raw) - known:
        raise ValueError(f"{file} has unknown keys {sorted(unknown)}; known: {', '.join(sorted(known))}")
    return Recipe(
        folder=folder,
        stages=tuple(str(stage) for stage in raw["stages"]),
        scale=raw.get("scale"),
        strategy=raw.get("strategy", "single"),
        strategies=raw.get("strategies") or {},
        starts=_starts(file, raw),
        skip=raw.get("skip") or {},
        next=tuple(raw.get("next", ())),
        plugins=tuple(raw.get("plugins") or ()),
        about=raw.get("about", ""),
    )


def _starts(file: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    starts = dict(raw.get("starts") or {})
    for stage, other in starts.items():
        order = [str(name) for name in raw["stages"]]
        if stage not in order or other not in order[: order.index(stage)]:
            raise ValueError(f"{file}: starts says '{stage}: {other}'; both must be stages, the second an earlier one")
    return starts
