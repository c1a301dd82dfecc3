from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, hindrance

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM of four nodes with two CPUs each, which all tests use one after the other."""
    if reason := hindrance():
        pytest.skip(reason)
    cluster = Slurm()
    yield cluster
    cluster.stop()
