"""Names and tags by which runs are told apart and grouped, whatever logger keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

RUN_TAGS = "LIT_VLM_RUN_TAGS"
"""Environment variable: a JSON object of tags, for each run that starts with it."""
RUN = "run"
"""Tag: the name of the run that a stage belongs to."""
TOLD_APART = ("variant", "seed")
"""Tags that are parameters as well, as plots over many runs have axes for parameters only."""


def given_tags() -> dict[str, str]:
    """The tags that `LIT_VLM_RUN_TAGS` gives to this process's run.

    Raises:
        ValueError: for a value that is no JSON object of texts, numbers and booleans.
    """
    text = os.environ.get(RUN_TAGS)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str | int | float) for value in found.values()):
        raise ValueError(
            f'{RUN_TAGS} is a JSON object of texts and numbers, such as {{"variant": "base", "seed": 0}}, and not '
            f"{text!r}: correct or unset it"
        )
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}


def for_children(tags: Mapping[str, str]) -> dict[str, str]:
    """The environment variable by which processes that this one starts give these tags to their runs."""
    return {RUN_TAGS: json.dumps(dict(tags), ensure_ascii=False)}


def run_name(folder: Path) -> str:
    """The name of the run of a folder: as the tag `run` says, or else the folder's own."""
    return given_tags().get(RUN) or folder.absolute().name


def stage_name(folder: Path) -> str:
    """The name of the run of a stage: that of the run that it belongs to before its folder's, if it belongs to one."""
    run = given_tags().get(RUN)
    return f"{run}/{folder.absolute().name}" if run else folder.absolute().name
