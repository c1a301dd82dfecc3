"""`lit-vlm prepare targets`: features of teachers or of a frozen encoder, computed once before training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_vlm.commands.fit import lightning_cli, unlaunched
from lit_vlm.commands.workers import add_on, engine_of
from lit_vlm.core.batch import ENCODER
from lit_vlm.core.launcher import launch
from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.sets.shared import Work
from lit_vlm.model.build import build_on_meta
from lit_vlm.training.module import LitVLM
from lit_vlm.training.prepare import PrepareSettings, begin, features_work, finish, write_blocks


def main(argv: Sequence[str]) -> None:
    """Prepare the features of one network over the training data of a stage.

    Raises:
        ValueError: for a wrong flag or key, or as `begin`, `engine_of`, `write_blocks` and `finish`.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.what != "targets":
        parser.error(f"there is nothing called '{arguments.what}' to prepare; write: lit-vlm prepare targets")
    module, data, of, precision = _open(rest, arguments.of)
    if begin(module, data, of, arguments.out, arguments.dtype):
        settings = PrepareSettings(arguments.dtype, arguments.batch_size, arguments.workers, precision)
        with engine_of(arguments.on) as engine:
            write_blocks(data, of, arguments.out, _Features(rest, of, settings, (module, data)), engine)
    info = finish(module, data, of, arguments.out, arguments.dtype)
    if not launch().is_first:
        return
    console = Console(highlight=False)
    size = sum(file.stat().st_size for file in arguments.out.glob("chunk-*.bin"))
    console.print(
        f"{arguments.out}: features of {info.images:,} images, {info.width} wide, {size / 2**20:,.1f} MiB as "
        f"{info.dtype}, relative error {info.error:.2e}\nread them with --data.prepared.{of} {arguments.out}",
        soft_wrap=True,
    )


def _open(config: Sequence[str], of: str | None) -> tuple[LitVLM, VLMData, str, str]:
    """The stage's module, with weights of only the network to prepare, its data, the network's name, the precision."""
    cli = lightning_cli([*config, "--trainer.logger", "false", *unlaunched()], run=False)
    module: LitVLM = cli.model
    module.model = build_on_meta(module.slots)
    teachers = [name for name in module.input_spec.networks if name != ENCODER]
    of = of or (teachers[0] if len(teachers) == 1 else None)
    if of is None:
        raise ValueError(f"name what to prepare with --of: {', '.join([*teachers, ENCODER])}")
    module.model = module.build(only=(ENCODER if of == ENCODER else f"heads.{of}",)).eval()
    return module, cli.datamodule, of, str(cli.trainer.precision)


@dataclass(frozen=True)
class _Features:
    """Opens the network on a device (`shared.OpenWork`); in another process it is made anew of the flags.

    Attributes:
        config: flags of the stage.
        of: name of a head, or `encoder`.
        settings: how features are prepared.
        opened: what this process has made of the flags.
    """

    config: Sequence[str]
    of: str
    settings: PrepareSettings
    opened: tuple[LitVLM, VLMData] | None

    def __call__(self, device: str) -> Work:
        module, data = self.opened or _open(self.config, self.of)[:2]
        return features_work(module, data, self.of, self.settings, device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm prepare targets",
        description="Compute the features of a head's teacher, or of the frozen encoder, for all images that a stage "
        "trains on, and write them as a LitData set. Work that was stopped goes on with the same command, and all "
        "that run it at the same time, as under srun, share the work.",
        epilog="All other flags are those of lit-vlm fit: --config FILE (several), --data.transform Resize, ... "
        "Training reads the set with --data.prepared.NAME OUT.",
        allow_abbrev=False,
    )
    parser.add_argument("what", metavar="targets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new set")
    parser.add_argument("--of", help="name of the head, or encoder (default: the only head with a teacher)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "int8"),
        default="bfloat16",
        help="int8 has a scale for each channel of an image; the error is reported (bfloat16)",
    )
    add_on(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="records at a time (32)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes per device (0)")
    return parser
