"""The flags `--on` and `--workers`."""

from __future__ import annotations

import pytest

from lit_vlm.commands.workers import engine_of
from lit_vlm.core.devices import cores
from lit_vlm.data.sets.engine import Local


def test_workers_are_counted_and_not_negative() -> None:
    with engine_of("local", 0) as none, engine_of("local") as default:
        assert (none, default) == (Local(0), Local(len(cores())))
    with pytest.raises(ValueError, match="--workers must be at least 0, not -1"), engine_of("local", -1):
        pass
