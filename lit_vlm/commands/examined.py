"""What a stage is made of: its resolved settings and the fingerprints of its data, by which equal ones are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_vlm.commands.apart import apart
from lit_vlm.commands.fit import quiet, quietly, take_plugins
from lit_vlm.core.plugins import load_plugins


class Examined(NamedTuple):
    """What a stage is made of.

    Attributes:
        settings: all settings, defaults included, before anything is chosen for this machine.
        fingerprints: `train/NAME` or `val/NAME` of each source → hash of its content.
        devices: devices of this machine that it trains on.
        on_gpus: whether they are GPUs.
    """

    settings: dict[str, Any]
    fingerprints: dict[str, str]
    devices: int
    on_gpus: bool


def examine(commands: Sequence[Sequence[str]], data: bool = True) -> list[Examined]:
    """Parse the flags of stages, build their objects and sources, and read what their data is; no part is built.

    Args:
        commands: arguments of `lit-vlm fit`, `fit` among them.
        data: whether the data is there; without, flags are parsed alone, and nothing is known of data and devices.

    Raises:
        SystemExit: for a wrong flag or missing data, which has been reported in one line.
    """
    return apart(_examine_all if data else _parse_all, commands)


def _examine_all(commands: Sequence[Sequence[str]]) -> list[Examined]:
    return [_examine(take_plugins(list(words[1:]))) for words in commands]


def _parse_all(commands: Sequence[Sequence[str]]) -> list[Examined]:
    quiet()
    with quietly():
        from lit_vlm.commands.diff import resolved

        load_plugins()
        return [Examined(resolved(take_plugins(list(words[1:]))), {}, 1, on_gpus=False) for words in commands]


def _examine(words: Sequence[str]) -> Examined:
    quiet()
    with quietly():
        from lit_vlm.commands.lightning_cli import ExaminedCLI

        load_plugins()
        cli = ExaminedCLI([*words, "--trainer.logger", "false"])
        _check(cli.config.trainer)
        device = cli.trainer.strategy.root_device
        return Examined(
            cli.settings, cli.datamodule.fingerprints(), len(cli.trainer.device_ids) or 1, device.type == "cuda"
        )


def _check(trainer: Any) -> None:
    """Refuse what an ablation cannot give a stage.

    Raises:
        ValueError: for several machines, or devices by their numbers.
    """
    if trainer.num_nodes not in (1, "auto"):
        raise ValueError(
            f"trainer.num_nodes is {trainer.num_nodes}, and an ablation runs each stage on one machine: lit-vlm submit "
            "runs one variant on several"
        )
    counted = isinstance(trainer.devices, int) or str(trainer.devices).lstrip("-").isdecimal()
    if not counted and trainer.devices != "auto":
        raise ValueError(
            f"trainer.devices is {trainer.devices}, and an ablation gives each stage its devices: say how many, and by "
            "CUDA_VISIBLE_DEVICES which there are"
        )
