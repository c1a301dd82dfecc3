"""Versions of packages that are installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

import lit_vlm


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions by name; packages that are not installed are left out.

    lit-vlm's own is the one of its code, which may run from a folder that no package was made of.
    """
    found = {}
    for name in names:
        try:
            found[name] = lit_vlm.__version__ if name == "lit-vlm" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
