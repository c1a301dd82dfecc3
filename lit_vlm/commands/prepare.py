"""`lit-vlm prepare targets`: features of teachers or of a frozen encoder, computed once before training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch.multiprocessing as mp
from rich.console import Console

from lit_vlm.commands.fit import lightning_cli, unlaunched
from lit_vlm.core.batch import ENCODER
from lit_vlm.core.devices import own_devices
from lit_vlm.core.launcher import launch
from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.sets.shared import Place
from lit_vlm.model.build import build_on_meta
from lit_vlm.training.module import LitVLM
from lit_vlm.training.prepare import PrepareSettings, begin, finish, write_blocks


def main(argv: Sequence[str]) -> None:
    """Prepare the features of one network over the training data of a stage.

    Raises:
        ValueError: for a wrong flag or key, or as `begin`, `write_blocks` and `finish`.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.what != "targets":
        parser.error(f"there is nothing called '{arguments.what}' to prepare; write: lit-vlm prepare targets")
    module, data, of, precision = _open(rest, arguments.of)
    devices = own_devices(launch())
    if begin(module, data, of, arguments.out, arguments.dtype):
        if len(devices) > 1:
            mp.spawn(_work, (rest, of, arguments, devices), nprocs=len(devices))  # type: ignore[attr-defined]
        else:
            _write(module, data, of, precision, arguments, devices, 0)
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


def _work(index: int, config: Sequence[str], of: str, arguments: argparse.Namespace, devices: list[str]) -> None:
    module, data, _, precision = _open(config, of)
    _write(module, data, of, precision, arguments, devices, index)


def _write(
    module: LitVLM,
    data: VLMData,
    of: str,
    precision: str,
    arguments: argparse.Namespace,
    devices: list[str],
    index: int,
) -> None:
    started, count = launch(), len(devices)
    if of == ENCODER:
        module.vlm.encoder.to(devices[index])
    place = Place(started.rank * count + index, started.world_size * count)
    settings = PrepareSettings(
        arguments.dtype, arguments.batch_size, arguments.workers, devices[index], precision, place
    )
    write_blocks(module, data, of, arguments.out, settings)


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
    parser.add_argument("--batch-size", type=int, default=32, help="records at a time (32)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes per device (0)")
    return parser
