"""Sizes in bytes."""

from __future__ import annotations

import pytest

from lit_vlm.core.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("64MiB", 64 * 2**20), ("50GB", 50 * 10**9), ("1.5 kib", 1536), ("2T", 2 * 10**12), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--size") == size


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "5 boxes", "1e9", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="--size is a size such as 64MiB"):
        parse_size(text, "--size")
