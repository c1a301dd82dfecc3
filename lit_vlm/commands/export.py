"""`lit-vlm export`: a checkpoint in a published format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(argv: Sequence[str]) -> None:
    """Export a checkpoint: write it, read it back, compare logits, and only then report success.

    Raises:
        ValueError: as `load_run` and `export_published`.
    """
    from lit_vlm.checkpoints.published import FAMILIES, export_published, find_family

    parser = argparse.ArgumentParser(
        prog="lit-vlm export",
        description="Write a checkpoint in a published format, read it back, and compare logits before success.",
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument("out", type=Path, help="a folder that is new or empty")
    parser.add_argument(
        "--format",
        default="llava-hf",
        metavar="FAMILY",
        help=f"one of {', '.join(FAMILIES)}, or a family's class path. llava-hf (default) is transformers' "
        "LlavaForConditionalGeneration, the others are the names of each system's own code",
    )
    arguments = parser.parse_args(argv)
    find_family(arguments.format)  # an unknown format is reported before minutes of loading
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.evaluation.asker import load_run

    disable_progress_bar()
    run = load_run(arguments.checkpoint)
    difference = export_published(arguments.format, run.module.vlm, arguments.out, run.format.transform)
    Console(highlight=False).print(
        f"wrote {arguments.out}: read back, its logits differ by at most {difference:.1e}",
        soft_wrap=True,
    )
