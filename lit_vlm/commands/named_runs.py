"""Checkpoints by what a user names: a checkpoint, the folder of a stage or of a whole run; and where results go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from lit_vlm.checkpoints.folder import DONE_FILE, checkpoints_in, find_checkpoint, is_done, run_folder, step_of
from lit_vlm.commands.runs import STATE_FILE, RunState

EVALUATION = "evaluation"
"""Folder of results in that of a stage."""
RUN_HELP = "folder of `lit-vlm run` (its last finished stage), of a stage (its newest checkpoint), or a checkpoint"


class Named(NamedTuple):
    """A checkpoint that a user named.

    Attributes:
        checkpoint: the checkpoint.
        folder: folder of its stage.
        note: which one was taken, where the name leaves it open; "" for a checkpoint's own path.
    """

    checkpoint: Path
    folder: Path
    note: str = ""

    def results(self) -> Path:
        """Where the results of this checkpoint are kept: no two checkpoints of a stage share a folder."""
        folder = self.folder / EVALUATION
        return folder if self._is_last_of_done() else folder / self.checkpoint.stem

    def _is_last_of_done(self) -> bool:
        """Whether training has come to its end with this checkpoint, so that no newer one takes its place."""
        if not is_done(self.folder):
            return False
        step = json.loads((self.folder / DONE_FILE).read_text(encoding="utf-8")).get("step")
        found = checkpoints_in(self.folder)
        newest = bool(found) and found[-1].resolve() == self.checkpoint.resolve()
        return newest and step == step_of(self.checkpoint)


def find_named(source: str) -> Named:
    """The checkpoint that a path names: itself, the newest of a stage, or that of a run's last finished stage.

    Raises:
        ValueError: where there is no complete checkpoint, no config.yaml, or no stage of the run has ended.
    """
    path = Path(source).expanduser()
    if not (path / STATE_FILE).is_file():
        checkpoint = find_checkpoint(path)
        note = "" if checkpoint == path else f"{path}: its newest checkpoint, {checkpoint.name}"
        return Named(checkpoint, run_folder(checkpoint), note)
    state = RunState.load(path)
    stages, done = state.stages, [one for one in state.stages if one in state.done or is_done(path / one)]
    ended = [stage for stage in done if checkpoints_in(path / stage)]
    if not ended:
        begun = [stage for stage in stages if checkpoints_in(path / stage)]
        advice = f"name the folder of a stage, {path / begun[-1]}, to take its newest checkpoint" if begun else ""
        raise ValueError(f"no stage of the run {path} has ended ({', '.join(stages)}): {advice or 'train it first'}")
    checkpoint = find_checkpoint(path / ended[-1])
    return Named(checkpoint, path / ended[-1], f"{path}: its last finished stage, {ended[-1]} ({checkpoint.name})")


def name_checkpoint(source: str) -> str:
    """Path of the checkpoint that a path names; where the path leaves it open, stderr tells which one it is.

    Raises:
        ValueError: as `find_named`.
    """
    named = find_named(source)
    if named.note:
        Console(stderr=True, highlight=False).print(named.note, soft_wrap=True, markup=False)
    return str(named.checkpoint)


def labels(named: Sequence[Named]) -> list[str]:
    """Short names by which checkpoints are told apart: what differs in their paths."""
    parts = [_parts(one) for one in named]
    if len(parts) == 1:
        return [named[0].folder.name]
    # A folder on the way that all have in common tells nothing.
    while all(len(one) > 1 for one in parts) and len({one[0] for one in parts}) == 1:
        parts = [one[1:] for one in parts]
    while all(len(one) > 1 for one in parts) and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    return ["/".join(one) for one in parts]


def _parts(named: Named) -> tuple[str, ...]:
    return (*named.folder.absolute().parts[1:], named.checkpoint.stem)
