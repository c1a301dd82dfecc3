"""The cache folder: results that are made once on this machine and read again by later runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder of converted weights and rendered data sets: `LIT_VLM_CACHE`, or ~/.cache/lit-vlm; made if absent."""
    path = Path(os.environ.get("LIT_VLM_CACHE", Path.home() / ".cache" / "lit-vlm"))
    path.mkdir(parents=True, exist_ok=True)
    return path
