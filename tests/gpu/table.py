"""The figures of build/gpu as a table for docs/benchmarks.md: `python -m tests.gpu.table`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.gpu.bench import CASES, OUT

HEAD = (
    "| | tokens/s | MFU (plan) | step, s (plan) | peak, GiB (plan) | reserved (plan) | data wait | × transformers |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)


def table(folder: Path) -> str:
    """Markdown of all measurements in a folder, with the card and the versions.

    Raises:
        ValueError: for a folder without any.
    """
    files = {name: folder / f"{name}.json" for name in CASES}
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    found = {name: content for name, content in found.items() if not content["simulated"]}
    if not found:
        raise ValueError(f"{folder} holds no measurement of a real GPU: run make gpu, or python -m tests.gpu.bench")
    lines = []
    for device in dict.fromkeys(content["device"] for content in found.values()):
        of_device = {name: content for name, content in found.items() if content["device"] == device}
        versions = next(iter(of_device.values()))["versions"]
        named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "cuda") if name in versions)
        lines += [f"{device}; {named}; random weights. In brackets what `lit-vlm plan` says.", "", *HEAD]
        lines += [_row(name, stage) for name, content in of_device.items() for stage in content["stages"]]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, stage: dict[str, Any]) -> str:
    plan, other = stage["plan"], stage.get("transformers")

    def pair(figure: str, scale: float = 1.0, places: int = 1, unit: str = "") -> str:
        if stage[figure] is None:
            return "–"
        planned = f" ({scale * plan[figure]:.{places}f}{unit})" if figure in plan else ""
        return f"{scale * stage[figure]:.{places}f}{unit}{planned}"

    cells = (
        CASES[name].what,
        f"{stage['tokens_per_s']:,.0f}",
        pair("mfu", 100, 0, " %"),
        pair("step_seconds", 1, 2),
        pair("allocated_gib"),
        pair("reserved_gib"),
        f"{100 * stage['data_wait']:.1f} %",
        f"{other['ratio']:.2f}" if other else "",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        print(table(OUT))  # noqa: T201
    except ValueError as error:
        sys.exit(str(error))
