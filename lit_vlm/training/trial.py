"""A training as a trial of an Optuna study: where the study is, and what gives a trial up. Loads no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage

TUNED_FILE = "tuned.json"
"""What `callbacks.Pruning` leaves in the folder of a stage: the last score, and whether the trial was given up."""
STUDY = "tune"
"""Name of the study in its file."""
WAIT = 60.0
"""Seconds that a process waits for the file of the study while others write it."""
FIRST = 10
"""Share of a training, in percent, before which it is not given up, as its learning rate still warms up."""
PrunerName = Literal["median", "hyperband", "none"]


def open_storage(file: Path) -> RDBStorage:
    """The storage of a study in a SQLite file, which several processes may use.

    Args:
        file: the file; it is made where it is missing.
    """
    from optuna.storages import RDBStorage

    return RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": WAIT}})


def pruner_of(name: PrunerName, startup: int) -> BasePruner:
    """Optuna's pruner of a name, for steps in percent of a training.

    Args:
        name: the name.
        startup: for `median`: number of trials that are compared with at least.
    """
    from optuna import pruners

    if name == "median":
        return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=FIRST)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=FIRST, max_resource=100)
    return pruners.NopPruner()
