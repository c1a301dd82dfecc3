"""`lit-vlm data caption`: new captions for the pictures of a set, the old text beside them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lit_vlm.commands.fit import REFUSED
from lit_vlm.commands.named_runs import find_named
from lit_vlm.commands.workers import RAY, add_on, engine_of
from lit_vlm.core.devices import own_devices
from lit_vlm.core.launcher import launch
from lit_vlm.core.precision import choose
from lit_vlm.core.pretrained import is_hub_name
from lit_vlm.data.given import open_as
from lit_vlm.data.records import Record
from lit_vlm.data.sets.convert import TooManyBad
from lit_vlm.data.sources import Converted

if TYPE_CHECKING:
    from lit_vlm.evaluation.captioning import CaptionModel

LLAVA = "llava-hf:"
"""Says that a folder or hub name is of LLaVA in the form of transformers, as for `model.stage.start_from`."""
SHOWN = 3
"""Captions that are shown beside the old text."""


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    parser = verbs.add_parser(
        "caption",
        help="new captions for the pictures of a set, by a run or a model of transformers",
        description="Write a set in which every picture of SET has a new caption. The old text is kept beside it. "
        "Captions that fail a check are listed in OUT/bad_samples.jsonl. Work that was stopped goes on with the same "
        "command, and all that run it at the same time, as under srun, share the work; every GPU has a model.",
    )
    parser.add_argument("set", metavar="SET", help="a converted set, or what lit-vlm data convert takes")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new set")
    parser.add_argument(
        "--model",
        required=True,
        metavar="RUN|FOLDER|HUB",
        help="a run or checkpoint of this kit, or an image-text-to-text model of transformers by its folder or hub "
        "name, with llava-hf: in front or without",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that FOLDER brings, as an export of this kit does"
    )
    parser.add_argument("--form", help="how to read SET, if not as recognised; see lit-vlm data convert --help")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="an argument of SET's class"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="what the model is asked; of several, each picture is asked one, drawn by --seed (Describe the image.)",
    )
    _add_decoding(parser)
    _add_checks(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=256, help="length of a caption at most (256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share (1)")
    parser.add_argument("--seed", type=int, default=0, help="draws prompts, and tokens above temperature 0 (0)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time on a device (16)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of weights (default: what the device is fast in)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes per device that decode pictures (2)")
    add_on(parser)


def _add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-side", type=int, default=4, help="a picture with a shorter side is unusable (4)")
    parser.add_argument("--min-words", type=int, default=3, help="fewest words of a caption (3)")
    parser.add_argument("--max-words", type=int, help="most words of a caption (default: no limit but --max-tokens)")
    parser.add_argument(
        "--max-repeated", type=float, default=0.3, help="largest share of repeated runs of four words (0.3)"
    )
    parser.add_argument(
        "--refuse", action="append", default=[], metavar="REGEX", help="a caption in which it is found is unusable"
    )
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, help="share without a usable caption above which it fails (0.05)"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Caption a set, and say what came of it.

    Raises:
        ValueError: for a wrong flag, set or model, or as `caption`.
    """
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.evaluation.captioning import CaptionSettings, Checks, caption
    from lit_vlm.evaluation.captioning.work import PROMPT, CaptionBlock

    disable_progress_bar()
    if arguments.workers < 0:
        raise ValueError(f"--workers must be at least 0, not {arguments.workers}")
    settings = CaptionSettings(
        tuple(arguments.prompt or [PROMPT]),
        arguments.max_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        arguments.batch_size,
        arguments.min_side,
    )
    checks = Checks(arguments.min_words, arguments.max_words, arguments.max_repeated, tuple(arguments.refuse))
    source, started = open_as(arguments.set, arguments.form, arguments.settings), launch()
    if arguments.on == RAY and arguments.dtype is None:
        raise ValueError("--on ray: name --dtype, too, as the GPUs of the nodes may be other ones than this machine's")
    kind = own_devices(started)[0].split(":")[0]
    dtype = arguments.dtype or str(choose(kind, scaled=False).dtype).removeprefix("torch.")
    model = _model(arguments.model, dtype, arguments.trust_remote_code)
    work = CaptionBlock(source, model, settings, checks, workers=arguments.workers)
    try:
        with engine_of(arguments.on) as engine:
            caption(work, arguments.out, arguments.max_bad_share, engine)
    except TooManyBad:
        if started.is_first:
            raise
        sys.exit(REFUSED)  # all tasks find the same, and the first one says it
    if started.is_first:
        _tell(arguments.out, dtype)


def _model(given: str, dtype: str, trust: bool) -> CaptionModel:
    """The model that a word names: a hub name, a folder with config.json, or else a run."""
    from lit_vlm.evaluation.captioning import CaptionModel

    name = given.removeprefix(LLAVA)
    path = Path(name).expanduser()
    if name != given or is_hub_name(name) or (path / "config.json").is_file():
        return CaptionModel.of_transformers(str(path) if path.exists() else name, dtype, trust)
    if not path.exists():
        raise ValueError(f"--model {given}: there is no such run or folder")
    return CaptionModel.of_run(str(path), find_named(str(path)).checkpoint, dtype)


def _tell(out: Path, dtype: str) -> None:
    """Print what a set has, and some of its captions beside the old text."""
    captioned = Converted(str(out))
    info, console = captioned.info, Console(highlight=False)
    table = Table(title=f"{out}: new captions by {info.captions['model']['name']}", show_header=False)
    table.add_row("captions", f"{info.records:,} (pictures of {info.image_bytes / 2**20:,.1f} MiB)")
    table.add_row("weights", dtype)
    for reason, count in info.bad.items():
        table.add_row(f"[red]left out: {reason}", f"{count:,}")
    table.add_row("fingerprint", info.fingerprint)
    console.print(table)
    for index in range(min(SHOWN, len(captioned))):
        record = captioned.outline(index)
        console.print(f"{record.id}\n  old: {_old(record)}\n  new: {record.messages[-1].text}", markup=False)
    if info.bad:
        console.print(f"left-out pictures are listed in {out / 'bad_samples.jsonl'}", soft_wrap=True)


def _old(record: Record) -> str:
    """The last answer or document that a picture had; "-" where it had none."""
    return next((turn.text.strip() for turn in reversed(record.earlier) if turn.role in ("assistant", "document")), "-")
