"""Names of sources, which samples, counts, losses and weights are reported under: each names one source only."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from lit_vlm.core.metric_names import safe_name
from lit_vlm.data.remote import place_of
from lit_vlm.data.sources.base import Source

LONGEST = 150
"""Most letters of a name: MLflow takes 250 for a metric, which has its kind in front of the name."""


def name_key(name: str) -> str:
    """The form of a name that must be unique: its letters in a metric, in small letters, as stores may ignore case."""
    return safe_name(name).casefold()


def tell_apart(sources: Sequence[Source], beside: Sequence[Source] = (), strictly: bool = False) -> None:
    """Give sources of one name different ones, from the folders that they lie in: `docvqa-val` and `chartqa-val`.

    A name that the user gave stays. Another becomes the name of the file with its ending, or gets as many folders in
    front as it takes; sources that no path tells apart are numbered (`shapes-2`). The result depends on the order and
    the paths of the sources alone.

    Args:
        sources: sources whose names are changed in place.
        beside: sources whose names stay; `sources` that read something else get other names.
        strictly: whether no name of `beside` may be used again, not even by a source that reads the same or was named.

    Raises:
        ValueError: for a name that no metric can have, and for two equal names that were given.
    """
    for source in sources:
        _check(source)
    others = [other for other in beside if all(other is not source for source in sources)]
    _refuse_equal([*sources, *(others if strictly else ())])
    for source in sources:
        taken = {name_key(other.name) for other in others if strictly or _differ(source, other)}
        same = [one for one in sources if name_key(one.name) == name_key(source.name)]
        if not source.named and (len(same) > 1 or name_key(source.name) in taken):
            renamed = [one for one in same if not one.named]
            rest = [one for one in sources if one.named or name_key(one.name) != name_key(source.name)]
            _rename(renamed, taken | {name_key(one.name) for one in rest})


def _rename(sources: Sequence[Source], taken: set[str]) -> None:
    """Give sources of one name new names, none of which is in `taken`."""
    paths = [Path(os.path.abspath(place_of(source.path))) if source.path is not None else None for source in sources]
    deepest = max((len(path.parts) for path in paths if path is not None), default=1)
    for depth in range(1, deepest):
        labels = [
            source.name if path is None else path.name if depth == 1 else "-".join([*path.parts[-depth:-1], path.stem])
            for source, path in zip(sources, paths, strict=True)
        ]
        keys = {name_key(label) for label in labels}
        if len(keys) == len(labels) and not keys & taken and all(len(label) <= LONGEST for label in labels):
            break
    else:
        labels = [source.name for source in sources]
    for source, label in zip(sources, labels, strict=True):
        number, name = 1, label
        while name_key(name) in taken:
            number += 1
            name = f"{label}-{number}"
        source.name = name
        taken.add(name_key(name))


def _differ(one: Source, other: Source) -> bool:
    """Whether two sources read different files, and no user named them alike."""
    return not one.named and one.path is not None and one.path != other.path


def _check(source: Source) -> None:
    name = source.name
    if not source.named and len(name) > LONGEST:
        source.name = name = name[:LONGEST]
    if (
        not name.strip()
        or len(name) > LONGEST
        or posixpath.normpath(name) != name
        or name.startswith(("/", ".."))
        or name == "."
    ):
        raise ValueError(
            f"the name {name!r} of a source ({_told(source)}) cannot be part of a metric's name: set init_args.name to "
            f"1 to {LONGEST} letters, without empty or dotted parts between slashes"
        )


def _refuse_equal(sources: Sequence[Source]) -> None:
    given: dict[str, Source] = {}
    for source in sources:
        if source.named and (other := given.setdefault(name_key(source.name), source)) is not source:
            raise ValueError(
                f"two sources are named '{other.name}' ({_told(other)}) and '{source.name}' ({_told(source)}), which "
                "would be one metric: set another init_args.name"
            )


def _told(source: Source) -> str:
    """The class and the path of a source, for errors."""
    kind = type(source).__name__
    return kind if source.path is None else f"{kind} of {source.path}"
