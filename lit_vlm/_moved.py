"""Module paths of earlier versions, which existing config files, checkpoints and other packages still name.

`import lit_vlm.batch` gives the same module object as `lit_vlm.core.batch`, so that a class is one class under both
paths. `old_name` is the inverse: identities on disk (caches, prepared features, order of samples) were made with the
earlier paths and must not change.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType

MOVED = {
    "batch": "core.batch",
    "build": "model.build",
    "checkpoints.eve": "checkpoints.published.eve",
    "checkpoints.eve_v2": "checkpoints.published.eve_v2",
    "checkpoints.files": "checkpoints",
    "checkpoints.hovle": "checkpoints.published.hovle",
    "checkpoints.layout": "checkpoints.published.layout",
    "checkpoints.llava_hf": "checkpoints.published.llava_hf",
    "checkpoints.ola_vlm": "checkpoints.published.ola_vlm",
    "checkpoints.run": "evaluation.asker",
    "checkpoints.safetensors": "core.safetensors",
    "checkpoints.vila": "checkpoints.published.vila",
    "cli": "commands.cli",
    "commands.check": "commands.dry_run",
    "commands.named_sources": "commands.config_parser",
    "data.batching": "data.feed.batching",
    "data.check": "data.sets.check",
    "data.collate": "data.sample.collate",
    "data.convert": "data.sets.convert",
    "data.encode": "data.sample.encode",
    "data.files": "data.records.files",
    "data.format": "data.sample.format",
    "data.forms": "data.sets.forms",
    "data.loader": "data.feed.loader",
    "data.media": "data.records.media",
    "data.mixture": "data.feed.mixture",
    "data.names": "data.feed.names",
    "data.openmoji": "worlds.openmoji",
    "data.parallel": "data.sets.parallel",
    "data.parsing": "data.records.parsing",
    "data.plan": "data.feed.plan",
    "data.png": "data.records.png",
    "data.prepared": "data.sample.prepared",
    "data.scan": "data.sets.scan",
    "data.scenes": "worlds.scenes",
    "data.shapes": "worlds.shapes",
    "data.shards": "data.sets.shards",
    "data.spec": "data.sample.spec",
    "data.spelling": "data.sample.spelling",
    "data.split": "data.feed.split",
    "data.stats": "data.sets.stats",
    "data.templates": "data.sample.templates",
    "data.tiles": "data.sample.tiles",
    "data.transforms": "data.sample.transforms",
    "data.usable": "data.feed.usable",
    "decoders.lora": "core.lora",
    "flops": "core.flops",
    "generate": "model.generate",
    "lightning_cli": "commands.lightning_cli",
    "lmms_eval": "evaluation.lmms_eval",
    "losses": "core.losses",
    "metric_names": "core.metric_names",
    "metrics": "evaluation.metrics",
    "mini": "worlds.mini",
    "mlflow_run": "training.mlflow_run",
    "mlflow_store": "training.mlflow_store",
    "module": "training.module",
    "optim": "training.optim",
    "part": "core.part",
    "precision": "core.precision",
    "prepare": "training.prepare",
    "pretrained": "core.pretrained",
    "probe": "evaluation.probe",
    "progress": "core.progress",
    "recipe": "commands.recipe",
    "sharding": "training.sharding",
    "stage": "training.stage",
    "step_flops": "training.step_flops",
    "tasks": "evaluation.tasks",
    "tasks.held_out": "evaluation.held_out",
    "tasks.held_out_records": "evaluation.held_out_records",
    "tokenizers": "core.tokenizers",
    "tracking": "training.tracking",
    "trainer": "training.trainer",
}
"""Earlier path → present path, both below `lit_vlm`; the modules of a package move with it."""


def new_name(name: str) -> str | None:
    """The present path of an earlier module path; None for a path that has not moved."""
    parts = name.removeprefix("lit_vlm.").split(".")
    for end in range(len(parts), 0, -1):
        if (found := MOVED.get(".".join(parts[:end]))) is not None:
            return ".".join(["lit_vlm", found, *parts[end:]])
    return None


def old_name(name: str) -> str:
    """The earlier path of a module that has moved; any other path unchanged."""
    own = name.removeprefix("lit_vlm.")
    for old, new in MOVED.items():
        if own == new or own.startswith(f"{new}."):
            return f"lit_vlm.{old}{own.removeprefix(new)}"
    return "lit_vlm.data.records" if own == "data.records.record" else name


class _MovedFinder(importlib.abc.MetaPathFinder):
    """Finds a moved module under its earlier path; Python asks it last, when no file of that name exists."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The import spec of an earlier path; None for any other path."""
        name = new_name(fullname) if fullname.startswith("lit_vlm.") else None
        found = importlib.util.find_spec(name) if name else None
        if name is None or found is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, _SameModule(name), is_package=found.loader is None)


class _SameModule(importlib.abc.InspectLoader):
    """Loads an earlier path as the module at the present path, without changing that module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module at the present path."""
        module = importlib.import_module(self.name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has overwritten; there is nothing to execute."""
        module.__spec__ = self._spec

    def get_code(self, fullname: str) -> CodeType | None:
        """The code, for `python -m` with an earlier path."""
        found = importlib.util.find_spec(self.name)
        loader = found.loader if found else None
        return loader.get_code(self.name) if isinstance(loader, importlib.abc.InspectLoader) else None

    def get_source(self, fullname: str) -> str | None:
        """The source, for tracebacks."""
        found = importlib.util.find_spec(self.name)
        loader = found.loader if found else None
        return loader.get_source(self.name) if isinstance(loader, importlib.abc.InspectLoader) else None


sys.meta_path.append(_MovedFinder())
