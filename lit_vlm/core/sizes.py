"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
"""Unit in small letters → bytes."""
WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str, key: str) -> int:
    """The bytes of a size such as `64MiB` (1024² bytes each), `50GB` (1000³) or `1000000`.

    Args:
        text: the size.
        key: name of the setting, for the error.

    Raises:
        ValueError: for something else, or a size of less than a byte.
    """
    match = WRITTEN.fullmatch(text)
    unit = UNITS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(f"{key} is a size such as 64MiB, 50GB or 1000000 (bytes), not {text!r}")
    return size
