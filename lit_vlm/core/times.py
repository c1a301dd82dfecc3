"""Lengths of time, as SLURM writes them."""

from __future__ import annotations

import re

TIME = re.compile(r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?"
                  r"|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)|(?P<min>\d+)(?::(?P<sec>\d+))?)")  # fmt: skip


def seconds_of(time: str) -> int | None:
    """Seconds of a length of time: minutes (`90`), `HH:MM:SS`, `D-HH` and so on; None for what SLURM would refuse."""
    if (match := TIME.fullmatch(time)) is None:
        return None
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours = 24 * part["days"] + part["hours"] + part["h"]
    minutes = part["minutes"] + part["m"] + part["min"]
    return 3600 * hours + 60 * minutes + part["seconds"] + part["s"] + part["sec"]
