"""LightningCLI, set up for this kit. The module imports every slot, so that flags can name classes by bare names."""

from __future__ import annotations

import json
import logging
from argparse import SUPPRESS, ArgumentError
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from callbacks import Checkpoint, Preemption, Watchdog
from lit_vlm.checkpoints.folder import checkpoints_in, find_checkpoint, mark_done, run_folder
from lit_vlm.checkpoints.weights import read_place
from lit_vlm.commands.config_parser import Parser
from lit_vlm.commands.flags import explain, innermost
from lit_vlm.commands.runs import run_folder_for
from lit_vlm.core.launcher import launch
from lit_vlm.core.precision import AUTO, crowded
from lit_vlm.data import VLMData
from lit_vlm.data.given import DataPath
from lit_vlm.training.elastic import COUNTING, keep_step
from lit_vlm.training.launched import agree_settings
from lit_vlm.training.loggers import check_packages, refusals_in_one_line, tell_folder
from lit_vlm.training.module import LitVLM
from lit_vlm.training.run_record import RunRecord
from lit_vlm.training.sharding import FSDP2  # noqa: F401 - a class name for recipes
from lit_vlm.training.trainer import Trainer, device_type

TRAINING_ALONE = ("ckpt_path", "weights_only")
"""Arguments of the command `fit` that no other one has."""
WORDS = ("last", "best")
"""Words that `--ckpt_path` takes besides paths: they name checkpoints in the run's own folder."""
DEFAULT_CALLBACKS = (
    "callbacks.FreezeGuard",
    "callbacks.GradientMonitor",
    "callbacks.Planned",
    "callbacks.Memory",
    "callbacks.Sources",
    "callbacks.Throughput",
    "callbacks.Stragglers",
    "callbacks.Progress",
)


class LitVLMCLI(LightningCLI):
    """LightningCLI with this kit's module, data, trainer, parser and defaults."""

    def __init__(self, args: list[str] | dict[str, Any] | None, run: bool = True) -> None:
        self._looks = not run
        disable_progress_bar()  # the bars of loading local weights; downloads keep theirs
        super().__init__(
            model_class=LitVLM,
            datamodule_class=VLMData,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_class=Trainer,
            seed_everything_default=0,
            trainer_defaults={
                "logger": {"class_path": "lit_vlm.training.tracking.MLflow"},
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10,
            },
            parser_kwargs={"parser_mode": "omegaconf"},
            parser_class=Parser,
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises its errors instead of exiting, so that they can be rewritten in one line."""
        return super().init_parser(**kwargs | {"exit_on_error": False, "allow_abbrev": False})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse config files and flags.

        Raises:
            ValueError: for a wrong flag or key, with what was found, and the nearest names.
        """
        try:
            self._parse(parser, args)
            for name in TRAINING_ALONE if self._looks else ():
                self.config.pop(name, None)
        except ArgumentError as error:
            raise ValueError(explain(str(error), self._flags(parser))) from error

    def _parse(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)

    def _flags(self, parser: LightningArgumentParser) -> list[str]:
        """All flags of the command, without dashes."""
        parsers = [parser, *getattr(self, "_subcommand_parsers", {}).values()]
        return [flag.lstrip("-") for one in parsers for action in one._actions for flag in action.option_strings]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give three callbacks keys of their own, as flags cannot change an item inside the list of callbacks.

        Where nothing is run, the config of a run is taken with what only training has.
        """
        assert isinstance(parser, Parser)
        for name in TRAINING_ALONE if self._looks else ():
            parser.add_argument(f"--{name}", type=Any, help=SUPPRESS)
        parser.check_names()
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.set_defaults({"trainer.callbacks": [{"class_path": path} for path in DEFAULT_CALLBACKS]})

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder, checkpoint and precision, and keep Lightning's adverts out of the output.

        Raises:
            ValueError: when other processes were started than the trainer wants, the folder holds another run, or it
                has no complete checkpoint to resume from.
        """
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
            lambda r: "litlogger" not in r.getMessage()
        )
        config = self.config[self.subcommand] if self.subcommand else self.config
        check_packages(config.trainer.logger)
        agree_settings(config.trainer, device_type(config.trainer.accelerator))
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = run_folder_for(config.model.stage.name)
        source = config.get("ckpt_path")
        if source == "last":  # which Lightning looks for under a name that no checkpoint of this kit has
            source = config.ckpt_path = str(find_checkpoint(config.trainer.default_root_dir))
        if source and Path(source).is_dir() and (Path(source) / "checkpoints").is_dir():
            config.ckpt_path = str(find_checkpoint(source))
        if self.subcommand == "fit":
            folder = Path(config.trainer.default_root_dir)
            found = checkpoints_in(folder)
            if found and not config.get("ckpt_path") and launch().attempt:  # the launcher has given the command again
                config.ckpt_path = str(found[-1])
            _refuse_other_run(folder, config.get("ckpt_path"))
        if self.subcommand == "validate" and not config.trainer.limit_val_batches:
            raise ValueError(
                "trainer.limit_val_batches is 0 in this config, so nothing would be validated: add "
                "--trainer.limit_val_batches 1.0"
            )
        if config.trainer.accumulate_grad_batches < 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is at least 1, not {config.trainer.accumulate_grad_batches}"
            )
        if self.subcommand in (None, "fit") and 0 in (config.trainer.max_steps, config.trainer.max_epochs):
            raise ValueError("trainer.max_steps or trainer.max_epochs is 0, so nothing would be trained")
        if config.trainer.precision == AUTO:
            config.trainer.precision = _precision_begun(Path(config.trainer.default_root_dir), config.get("ckpt_path"))

    def instantiate_classes(self) -> None:
        """Build all objects, keep the precision in the config, and tell loggers the run's folder before any report."""
        try:
            super().instantiate_classes()
        except (TypeError, MisconfigurationException) as error:  # of Lightning's own arguments, such as devices
            raise ValueError(f"trainer: {error}") from error
        except ValueError as error:
            raise ValueError(innermost(str(error))) from error
        config = self.config[self.subcommand] if self.subcommand else self.config
        config.trainer.precision = str(self.trainer.precision)
        if self.subcommand:
            self._say_precision()
        checkpoint = config.get("ckpt_path")
        if self.subcommand == "fit" and checkpoint and checkpoint not in WORDS:
            self._keep_step(config)
        if self.subcommand == "fit":
            folder = Path(self.trainer.default_root_dir)
            if self.trainer.loggers:
                tell_folder(self.trainer, folder, go_on=bool(config.get("ckpt_path")) or self._began_so(folder))

    def _run_subcommand(self, subcommand: str) -> None:
        with refusals_in_one_line():
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Mark the stage as done: nothing else says that its training has come to its end."""
        trainer = self.trainer
        if trainer.is_global_zero and trainer.state.finished:
            mark_done(Path(trainer.default_root_dir), trainer.global_step)

    def after_predict(self) -> None:
        """Write the answers, of each process to a file of its own."""
        loop = self.trainer.predict_loop
        if not loop.return_predictions:
            return
        rank = f"-rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        file = Path(self.trainer.default_root_dir) / f"predictions{rank}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for batch in loop.predictions for row in batch]
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        Console(highlight=False, soft_wrap=True).print(f"{len(rows)} answers: {file}")

    def _began_so(self, folder: Path) -> bool:
        """Whether the run in a folder was started with the same settings, so that its MLflow run can go on."""
        file = folder / "config.yaml"
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        return file.is_file() and file.read_text(encoding="utf-8") == text

    def _keep_step(self, config: Any) -> None:
        """Keep the rows of an optimizer step where the run goes on with another number of devices."""
        lines = keep_step(self.trainer, self.datamodule, read_place(config.ckpt_path))
        for line in lines:
            rank_zero_info(line)
        if lines:
            config.data.batch_size = self.datamodule.batch_size
            for name in ("accumulate_grad_batches", *COUNTING):
                if isinstance(value := getattr(self.trainer, name), int):
                    config.trainer[name] = value

    @rank_zero_only
    def _say_precision(self) -> None:
        assert isinstance(self.trainer, Trainer)
        chosen = self.trainer.chosen
        why = chosen.why if chosen is not None else "as the config says"
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"precision {self.trainer.precision}: {why}")
        if warning := crowded():
            console.print(f"[yellow]{warning}[/]")


class ParsedCLI(LitVLMCLI):
    """Parses the config of a stage and builds nothing, to read settings."""

    def __init__(self, args: list[str] | dict[str, Any]) -> None:
        super().__init__(args, run=False)

    def _parse(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own way warns of arguments beside those of the process, which are another command's here.
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def _set_seed(self) -> None:
        """Set no seed, as nothing random is done."""

    def before_instantiate_classes(self) -> None:
        """Do nothing, as no run begins."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class CheckedCLI(ParsedCLI):
    """Builds the objects of a stage but its sources: whether settings are taken, without reading data."""

    def before_instantiate_classes(self) -> None:
        """As for a stage."""
        LitVLMCLI.before_instantiate_classes(self)

    def instantiate_classes(self) -> None:
        """Build all objects but sources; of a file that stands for one, look whether it is there.

        Raises:
            ValueError: for a setting that a class refuses, or a file that is not there.
        """
        for key in ("train", "val"):
            given = self.config.data[key]
            files = given if isinstance(given, dict) else {"": given}
            for name, file in files.items():
                path = str(file) if isinstance(file, str | DataPath) else None
                if path and ":" not in path and not Path(path).expanduser().exists():
                    raise ValueError(f"{'.'.join(filter(None, ('data', key, name)))}: there is no {path}")
            self.config.data[key] = []
        LitVLMCLI.instantiate_classes(self)


class ExaminedCLI(ParsedCLI):
    """Builds the objects of a stage and its sources.

    Attributes:
        settings: all settings, defaults included, before anything is chosen for this machine.
    """

    settings: dict[str, Any]

    def before_instantiate_classes(self) -> None:
        """Keep the settings; else as for a stage."""
        self.settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        LitVLMCLI.before_instantiate_classes(self)

    def instantiate_classes(self) -> None:
        """As for a stage."""
        LitVLMCLI.instantiate_classes(self)


def _refuse_other_run(folder: Path, checkpoint: str | None) -> None:
    """Refuse a folder that holds another run, as two models in one folder cannot be told apart.

    Raises:
        ValueError: when the folder holds a checkpoint that this run does not go on from, or one of Lightning's own.
    """
    if leftover := sorted(folder.glob("hpc_ckpt_*.ckpt")):
        raise ValueError(
            f"{leftover[-1]} is a checkpoint that an earlier version left when SLURM asked it to; Lightning would take "
            "it before any other. Move it away, or into checkpoints/ to go on from it"
        )
    found = checkpoints_in(folder)
    own = checkpoint in WORDS or (checkpoint and Path(checkpoint).resolve().is_relative_to(folder.resolve()))
    if found and not own:
        raise ValueError(
            f"{folder} holds a run already, whose newest checkpoint is {found[-1].name}: go on with it by --ckpt_path "
            f"{folder}, or name another folder by --trainer.default_root_dir"
        )


def _precision_begun(folder: Path, checkpoint: str | None) -> str:
    """The precision in which a resumed run began; `auto` for a new run, or where its config does not tell."""
    if not checkpoint:
        return AUTO
    try:
        file = run_folder(folder if not checkpoint or checkpoint in WORDS else checkpoint) / "config.yaml"
    except ValueError:  # the checkpoint was moved away from its run, and can be resumed all the same
        return AUTO
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("trainer"), dict):
        return AUTO  # config.yaml of another program, in a folder above
    return str(config["trainer"].get("precision") or "32-true")  # Lightning's default, in runs of earlier versions
