"""What a command `lit-vlm ablate` asks for: the file of an ablation, and what the command adds to it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_vlm.commands.ablation import FILE
from lit_vlm.commands.asked import Asked, ask, recipe_parser
from lit_vlm.commands.recipe import shipped_file
from lit_vlm.commands.submit import add_job_options
from lit_vlm.core.settings import PlainYaml, checked
from lit_vlm.experiments.file import SEED, AblationFile, read_file

YAML = (".yaml", ".yml")
SLURM, FINDINGS = "slurm", "--findings"


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "ablate",
        "FILE [options] [flags for all variants]\nRECIPE --vary FLAG=VALUE,VALUE [options] [flags for all variants]\n"
        f"--resume --out DIR\n{FINDINGS} DIR...",
        "Run variants of a recipe for several seeds. Stages that runs have in common train once. The same command goes "
        "on where it stopped, and a changed file runs what is new in it. What a file holds: docs/ablations.md.",
        f"{FINDINGS} DIR... prints the claims of finished ablations as a table in Markdown.\n"
        "Any other flag is one of lit-vlm run, for all variants: --data.batch_size 8, --1_align.trainer.max_steps 100.",
    )
    parser.add_argument("--out", type=Path, help="folder of the ablation (default: runs/NAME-OF-THE-FILE)")
    parser.add_argument(
        "--vary",
        action="append",
        metavar="FLAG=VALUES",
        help="a flag and its values, separated by commas, or names and values as {off: null, on: {r: 8}}; given "
        "several times, each combination is a variant",
    )
    parser.add_argument("--seeds", help="how many seeds, or which: 3, or 0,1,2")
    parser.add_argument(
        "--jobs",
        type=int,
        help="without GPUs: runs side by side, which share the cores; with --on slurm: jobs that share the runs "
        "(default: 1)",
    )
    parser.add_argument(
        "--on", choices=("local", SLURM), default="local", help="run on this machine, or as an array of jobs of SLURM"
    )
    parser.add_argument("--only", action="append", metavar="VARIANT", help="this variant alone; may be given again")
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="add seeds until every claim is decided, by intervals that allow for looking; the seeds are the budget",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and check every variant; train nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the ablation in --out")
    add_job_options(parser.add_argument_group("with --on slurm"))
    return parser


def read(argv: Sequence[str]) -> tuple[AblationFile, argparse.Namespace]:
    """The ablation that a command asks for.

    Raises:
        ValueError: for arguments that contradict each other, or as `read_file`.
    """
    asked = ask(_parser(), argv)
    options, named = asked.options, asked.recipe
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs is at least 1, not {options.jobs}")
    if options.resume:
        if named is not None or options.out is None:
            raise ValueError(
                "--resume goes on with the ablation in a folder, and takes no other file: --resume --out DIR"
            )
        named = str(options.out / FILE)
    if named is None:
        raise ValueError("name the file of an ablation, or a recipe with --vary, as the first argument")
    file = checked(AblationFile, _content(asked, named), named if _is_file(named) else "lit-vlm ablate")
    known = [variant.name for variant in file.all_variants()]
    if unknown := [name for name in options.only or () if name not in known]:
        raise ValueError(f"--only {unknown[0]}: there is no such variant; variants: {', '.join(known)}")
    return file, options


def _content(asked: Asked, named: str) -> dict[str, Any]:
    """The keys of an ablation: those of its file, and what the command adds."""
    options = asked.options
    if not _is_file(named) and not options.vary:
        raise ValueError(
            f"{named} is no file of an ablation, whose name ends in .yaml, and as a recipe it needs something to vary: "
            "--vary model.projector=Linear,MLP"
        )
    given: dict[str, Any] = {"recipe": named}
    if _is_file(named):
        given = read_file(shipped_file(named)).model_dump(exclude_unset=True)
    if options.sequential:
        given["sequential"] = True
    if options.seeds is not None:
        given["seeds"] = _seeds(options.seeds)
    if options.vary:
        given["grid"] = given.get("grid", {}) | dict(_varied(text) for text in options.vary)
    axes = {"scale": options.scale, "strategy": options.strategy, "stages": asked.stages}
    chosen = {key: value for key, value in axes.items() if value is not None}
    return _with(given, chosen, _flags(asked.flags))


def _with(given: dict[str, Any], axes: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The keys of an ablation, where axes and flags of the command win over those of its base and its variants.

    Raises:
        ValueError: for one that is among the flags of the grid.
    """
    if both := [name for name in (*axes, *flags) if name in given.get("grid", {})]:
        raise ValueError(f"--{both[0]} is what the grid varies: leave it out, or change the grid by --vary")

    def rest(own: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in own.items() if name not in axes and name not in flags}

    variants = {name: rest(own) for name, own in given.get("variants", {}).items()}
    return given | axes | {"base": rest(given.get("base", {})) | flags, "variants": variants}


def _is_file(named: str) -> bool:
    return Path(named).suffix in YAML


def name_for(argv: Sequence[str], file: AblationFile) -> str:
    """A name for the folder, the same for the same command; a file among a recipe's has the recipe's name in it."""
    first = Path(argv[0])
    if _is_file(argv[0]):
        beside = first.absolute().parent
        return f"{beside.parent.name}-{first.stem}" if beside.name == "ablations" else first.stem
    varied = [flag.replace(".", "_") if flag.count(".") > 1 else flag.rpartition(".")[2] for flag in file.grid]
    return "-".join(filter(None, (Path(file.recipe).name, file.scale, *varied)))


def _seeds(text: str) -> int | list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--seeds {text}: write how many (3), or which (0,1,2)")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def _varied(text: str) -> tuple[str, Any]:
    """A flag and its values from `FLAG=VALUE,VALUE`, or `FLAG={NAME: VALUE, ...}`."""
    flag, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"--vary {text}: write a flag and its values, as model.projector=Linear,MLP")
    try:
        found = yaml.load(values if values.startswith("{") else f"[{values}]", PlainYaml)
    except yaml.YAMLError as error:
        raise ValueError(f"--vary {text}: {' '.join(str(error).split())}") from error
    return flag.lstrip("-"), found


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """Flags of a command as a file has them: name → value."""
    flags: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name == SEED:
                raise ValueError(f"--{SEED} is the seed of each run: name the seeds by --seeds")
            if name in flags:
                raise ValueError(f"--{name} is there twice: give it once, with a list where it takes several")
            flags[name] = value if equals else "true"
        else:
            flags[name] = word
    return flags
