"""Which format takes which recipe, and what it changes: the table of docs/export.md."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from rich.console import Console

from lit_vlm.checkpoints.published import FAMILIES, export_published
from lit_vlm.hf.export import export_hf
from tests.exports import TINY, read


def _outcome(recipe: str, family: str) -> str:
    """What becomes of a tiny model of a recipe in a format."""
    module, config, written = read(recipe)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = Path(scratch) / "out"
        try:
            if family == "hf":
                difference = export_hf(module.vlm, config, written, module.input_spec, out).logits
            else:
                difference = export_published(family, module.vlm, out, written)
        except ValueError:
            return "refused"
    return "equal" if difference == 0 else f"to {difference:.0e}"


def main() -> None:
    """Print the table, one tiny model with random weights for each recipe."""
    show = Console(width=200, highlight=False).print
    families = ["hf", *FAMILIES]
    show("| recipe | " + " | ".join(f"`{family}`" for family in families) + " |")
    show("|---" * (len(families) + 1) + "|")
    for recipe in TINY:
        show(f"| {recipe} | " + " | ".join(_outcome(recipe, family) for family in families) + " |")
