"""The folder that keeps what was made once on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted weights and rendered data sets are kept: `LIT_VLM_CACHE`, or ~/.cache/lit-vlm."""
    path = Path(os.environ.get("LIT_VLM_CACHE", Path.home() / ".cache" / "lit-vlm"))
    path.mkdir(parents=True, exist_ok=True)
    return path
