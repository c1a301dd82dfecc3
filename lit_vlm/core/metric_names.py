"""Names of metrics and parameters that every metric store accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALLOCATED, RESERVED, HOST = "memory/allocated", "memory/reserved", "memory/host"
"""Peaks of memory in GiB: tensors on the device, what is reserved for them, and the process on the host."""


def safe_name(text: str) -> str:
    """Make a text a name of a metric or parameter that MLflow takes: letters and digits of any script, and `_-./: `."""
    letters = "".join(letter if letter.isalnum() or letter in "_-./: " else "_" for letter in text)
    return "/".join(part if part.strip(".") else "_" * max(1, len(part)) for part in letters.split("/"))


def safe_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under safe names; names that become the same one are numbered."""
    safe: dict[str, Any] = {}
    for key, value in values.items():
        name, number = safe_name(key), 1
        while (tried := name if number == 1 else f"{name}_{number}") in safe:
            number += 1
        safe[tried] = value
    return safe
