from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_vlm.planning import no_gpu

HERE = Path(__file__).parent
SECONDS = 90
"""Budget of one test: all of them together leave most of ten minutes to the measurements of `tests.gpu.bench`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if no_gpu.loaded():  # the code of these tests runs on a simulated GPU as well, but for the comparison of values
        no_gpu.prepare_fork()
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is no GPU")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < SECONDS, f"over the budget of {SECONDS} s"


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """Products in fp32 itself, where TF32 would be compared with fp32 otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
