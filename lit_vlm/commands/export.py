"""`lit-vlm export`: a checkpoint in a published format."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from lit_vlm.commands.named_runs import RUN_HELP, name_checkpoint
from lit_vlm.core.bits import Kind
from lit_vlm.core.written import check_new_folder

if TYPE_CHECKING:
    from lit_vlm.evaluation.asker import Asker

HF, PEFT, GGUF = "hf", "peft", "gguf"
"""Formats that belong to no system: any model, the adapters of one, and one for llama.cpp."""


def main(argv: Sequence[str]) -> None:
    """Export a checkpoint: write it, read it back, compare logits, and only then report success.

    Raises:
        ValueError: as `find_named`, `load_run`, `export_hf` and `export_published`.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.evaluation.asker import load_run
    from lit_vlm.experiments.card import model_card

    disable_progress_bar()
    arguments.checkpoint = name_checkpoint(arguments.checkpoint)
    run = load_run(arguments.checkpoint, quantise=arguments.quantise if arguments.format == HF else None)
    console = Console(highlight=False)
    rounded = arguments.quantise or (arguments.dtype if arguments.dtype != "float32" else None)
    card = model_card(arguments.checkpoint, arguments.format, shlex.join(["lit-vlm", "export", *argv]), rounded)
    if arguments.format == GGUF:
        said = _export_gguf(run, arguments.out, arguments.quantise)
    elif arguments.format == PEFT:
        said = _export_adapters(run, arguments.checkpoint, arguments.out, arguments.base)
    else:
        difference = _export(run, arguments.format, arguments.checkpoint, arguments.out)
        said = f"wrote {arguments.out}: read back, its logits differ by at most {difference:.1e}"
    if arguments.dtype != "float32":
        _round(arguments.out, arguments.dtype)
    (arguments.out / "README.md").write_text(card, encoding="utf-8")
    _open_to_others(arguments.out)
    said += f"; its blocks are in {arguments.quantise}" if arguments.format == HF and arguments.quantise else ""
    said += "" if arguments.dtype == "float32" else f"; then rounded to {arguments.dtype}"
    console.print(said, soft_wrap=True)
    console.print(f"its model card is {arguments.out}/README.md: add licences of data and weights", soft_wrap=True)
    if arguments.format == HF:
        console.print(
            f'AutoModelForImageTextToText.from_pretrained("{arguments.out}", trust_remote_code=True) loads it',
            soft_wrap=True,
        )
    if arguments.format == PEFT:
        console.print(f'lit_vlm.hf.adapters.load_adapted("{arguments.out}") loads them on their base', soft_wrap=True)
    if arguments.push:
        from lit_vlm.commands.push import push

        console.print(f"uploaded to {push(arguments.out, arguments.push)}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    from lit_vlm.checkpoints.published import FAMILIES

    parser = argparse.ArgumentParser(
        prog="lit-vlm export",
        description="Write a checkpoint in a published format, read it back, and compare logits before success.",
    )
    parser.add_argument("checkpoint", metavar="RUN", help=RUN_HELP)
    parser.add_argument("out", type=Path, help="a folder that is new or empty")
    parser.add_argument(
        "--format",
        default="llava-hf",
        metavar="FAMILY",
        help=f"{HF}, {PEFT}, {GGUF}, one of {', '.join(FAMILIES)}, or a family's class path. {HF} takes any model, for "
        f"transformers with trust_remote_code=True where lit-vlm is installed; {PEFT} writes the adapters of a run "
        f"(model.lora) on an {HF} folder; {GGUF} is for llama.cpp; llava-hf (default) is transformers' own "
        "LlavaForConditionalGeneration, the others are the names of each system's own code",
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help=f"of {PEFT}: folder or hub name of the {HF} export that the adapters are for; default: it is written as "
        "well, into base/ of the folder",
    )
    parser.add_argument(
        "--quantise",
        metavar="KIND",
        help=f"of {HF}: {', '.join(get_args(Kind))}, for the linear layers of all blocks; of {GGUF}: f32, f16 "
        "(default), q8_0, q6_k, q5_k_m or q4_k_m",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="what weights are rounded to, once they are compared (default: float32)",
    )
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="upload the folder to the model hub afterwards; a model that is not there yet is made, and is private",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Say what cannot be done before minutes of loading.

    Raises:
        ValueError: for flags of another format, an unknown format, a folder that is not empty, or no way to the hub.
    """
    if arguments.push:
        from lit_vlm.commands.push import check_push

        check_push(arguments.push)
    _check_base(arguments)
    _check_types(arguments)
    check_new_folder(arguments.out)
    if arguments.format not in (HF, PEFT, GGUF):
        from lit_vlm.checkpoints.published import find_family

        find_family(arguments.format)


def _check_base(arguments: argparse.Namespace) -> None:
    """Check the base of adapters; raises as `_check`."""
    if not arguments.base:
        return
    if arguments.format != PEFT:
        raise ValueError(f"--base is of --format {PEFT}")
    from lit_vlm.core.pretrained import is_hub_name
    from lit_vlm.hf.adapters import check_base

    check_base(arguments.base)
    if arguments.push and not is_hub_name(arguments.base):
        raise ValueError(
            f"--push: others cannot read the base {arguments.base}: upload it first (--format {HF} --push), and give "
            "its name on the hub as --base"
        )


def _check_types(arguments: argparse.Namespace) -> None:
    """Check the types that weights are to have; raises as `_check`."""
    kind = arguments.quantise
    if arguments.format == PEFT and arguments.dtype != "float32":
        raise ValueError(
            f"adapters are written in float32: round their base, by --format {HF} --dtype {arguments.dtype}, and give "
            "that folder as --base"
        )
    if kind and arguments.format not in (HF, GGUF):
        raise ValueError(f"--quantise is of --format {HF} and {GGUF}")
    if arguments.format == GGUF and arguments.dtype != "float32":
        raise ValueError(f"files of --format {GGUF} have their own types: use --quantise, not --dtype")
    if arguments.format == HF and kind:
        if kind not in get_args(Kind):
            raise ValueError(f"--quantise of --format {HF} is one of {', '.join(get_args(Kind))}, not {kind}")
        from lit_vlm.core.quantised import check_kind

        check_kind(kind, "--quantise")


def _export_gguf(run: Asker, out: Path, kind: str | None) -> str:
    """Write files for llama.cpp; returns what they are and how they were compared."""
    try:
        from lit_vlm.gguf.export import DEFAULT, export_gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"--format {GGUF} needs {error.name}: pip install 'lit-vlm[edge]'") from error

    found = export_gguf(run.module.vlm, run.format, run.module.input_spec, out, kind or DEFAULT)
    said = f"wrote {found.decoder} ({_megabytes(found.decoder)}) and {found.encoder} ({_megabytes(found.encoder)})"
    if found.same_text is None:
        return f"{said}; nothing was compared, as llama.cpp is not here: pip install 'lit-vlm[edge]'"
    said += f"; llama.cpp writes {'the same answer' if found.same_text else 'another answer'}"
    said += f" at {found.tokens_per_s:.0f} tokens/s" if found.tokens_per_s else ""
    if found.difference is None:
        return said
    return f"{said}, log-probabilities differ by {found.difference:.1%} of what another picture changes"


def _export_adapters(run: Asker, checkpoint: str, out: Path, base: str | None) -> str:
    """Write adapters; returns what they are and how they were compared."""
    from lit_vlm.evaluation.asker import run_config
    from lit_vlm.hf.adapters import BASE, export_adapters

    config = run_config(checkpoint)
    found = export_adapters(run.module.vlm, config, run.format, run.module.input_spec, out, base)
    whole = f" and the whole {', '.join(found.whole)}" if found.whole else ""
    return (
        f"wrote {out}: adapters{whole}, {found.parameters:,} parameters, on {base or out / BASE}; read back, its "
        f"logits differ by at most {found.differences.logits:.1e}"
    )


def _megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:,.1f} MB"


def _round(out: Path, dtype: str) -> None:
    """Round the weights of a folder that was compared; where that fails, nothing is left behind."""
    import torch

    from lit_vlm.core.safetensors import round_folder

    try:
        round_folder(out, getattr(torch, dtype))
    except (ValueError, OSError) as error:
        shutil.rmtree(out)
        raise ValueError(f"{out} cannot be written in {dtype}: {error}") from error


def _open_to_others(out: Path) -> None:
    """Give files the permissions that new files get here: safetensors writes files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in out.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _export(run: Asker, format_name: str, checkpoint: str, out: Path) -> float:
    """Write a model; returns the largest difference of its logits when it is read back."""
    if format_name == HF:
        from lit_vlm.evaluation.asker import run_config
        from lit_vlm.hf.export import export_hf

        return export_hf(run.module.vlm, run_config(checkpoint), run.format, run.module.input_spec, out).logits
    from lit_vlm.checkpoints.published import export_published

    return export_published(format_name, run.module.vlm, out, run.format)
