"""Which format takes which recipe, and what it changes: the table of docs/export.md."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from lit_vlm.checkpoints.published import FAMILIES, export_published
from lit_vlm.core.lora import is_adapter
from lit_vlm.gguf.export import export_gguf
from lit_vlm.hf.adapters import export_adapters
from lit_vlm.hf.export import export_hf
from tests.exports import TINY, read


def _outcome(recipe: str, family: str) -> str:
    """What becomes of a tiny model of a recipe in a format."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            difference = _difference(recipe, family, Path(scratch) / "out")
        except ValueError:
            return "refused"
    return "equal" if difference == 0 else f"to {difference:.0e}"


def _difference(recipe: str, family: str, out: Path) -> float | None:
    """Largest difference of a logit; of `gguf`, of a log-probability over what another picture changes."""
    module, config, written = read(recipe, **({"lora": {"decoder": {"rank": 2}}} if family == "peft" else {}))
    if family == "hf":
        return export_hf(module.vlm, config, written, module.input_spec, out).logits
    if family == "peft":
        torch.manual_seed(0)
        for name, parameter in module.vlm.named_parameters():
            if is_adapter(name):  # as they are made they do nothing
                torch.nn.init.normal_(parameter, std=0.1)
        return export_adapters(module.vlm, config, written, module.input_spec, out, None).differences.logits
    if family == "gguf":
        return export_gguf(module.vlm, written, module.input_spec, out, "f32").difference
    return export_published(family, module.vlm, out, written)


def main() -> None:
    """Print the table, one tiny model with random weights for each recipe."""
    logging.set_verbosity_error()
    disable_progress_bar()
    show = Console(width=200, highlight=False).print
    families = ["hf", "peft", "gguf", *FAMILIES]
    show("| recipe | " + " | ".join(f"`{family}`" for family in families) + " |")
    show("|---" * (len(families) + 1) + "|")
    for recipe in TINY:
        show(f"| {recipe} | " + " | ".join(_outcome(recipe, family) for family in families) + " |")
