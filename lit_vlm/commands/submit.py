"""`lit-vlm submit`: runs a recipe as a job of SLURM that saves, leaves and goes on when it is taken away."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lit_vlm.cluster.queue import Submitted, need_sbatch, sbatch, states
from lit_vlm.cluster.sbatch import LOGS, SCRIPT, Job, script
from lit_vlm.cluster.site import Site, check_time, read_site, site_file
from lit_vlm.commands.asked import FLAGS_OF_RUN, Asked, ask, recipe_parser
from lit_vlm.commands.begin import into, state_of
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.commands.run import check_commands, command_of
from lit_vlm.commands.runs import RunState
from lit_vlm.core.plugins import use_plugins
from lit_vlm.training.mlflow_store import absolute_uri, default_uri

OWN = {"--trainer.devices": "--gpus", "--trainer.num_nodes": "--nodes", "--resume": "the same command again"}
"""Flags that a job takes from elsewhere."""
SEED = "--seed_everything"


def main(argv: Sequence[str]) -> None:
    """Check the flags, write the script, show it and submit it.

    Raises:
        ValueError: for a wrong argument, flag or setting, a folder that holds another run or one that is in the queue,
            or where sbatch is missing or refuses.
        SystemExit: with `--wait`, with the exit code of the job; or for a wrong flag of a stage.
    """
    asked = ask(_parser(), argv)
    options = asked.options
    if not options.dry_run:
        need_sbatch()
    seeds = _seeds(options.array_of) if options.array_of is not None else ()
    site = site_of(options)
    _check(options, asked.flags, bool(seeds))
    state = _state(asked)
    recipe = find_recipe(state.recipe)
    use_plugins(state.plugins)
    name = "-".join(filter(None, (recipe.name, state.scale)))
    folder: Path = options.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folders = [folder / f"seed-{seed}" for seed in seeds] or [folder]
    for one, seed in zip(folders, seeds or [None], strict=True):
        into(one, state if seed is None else replace(state, flags=[*state.flags, SEED, str(seed)]))
    refuse_queued([folder, *folders])
    # No GPU of this machine is asked for, as it is not the one that trains.
    check_commands(
        [[*command_of(recipe, state, stage, folder), "--trainer.accelerator", "cpu"] for stage in state.stages]
    )
    tasks = options.gpus or options.tasks
    mlflow = absolute_uri(default_uri())
    job = Job(
        name, folder, _words(asked, state), options.nodes, options.gpus, tasks, site, seeds, image=options.container,
        mlflow=mlflow,
    )  # fmt: skip
    text = script(job)
    sys.stdout.write(text)
    sys.stdout.flush()
    if options.dry_run:
        return
    number = _submit(folder, text, state, seeds)
    console = Console(highlight=False, soft_wrap=True)
    log = f"{shlex.quote(str(folder / LOGS))}/{number}{'_*' if seeds else ''}.out"
    console.print(
        f"\njob {number}: {folder}\nhow it is: lit-vlm status {shlex.quote(str(folder))}\nits output: tail -F {log}\n"
        f"to end it: scancel {number}"
    )
    if options.wait:
        from lit_vlm.commands.follow import follow

        raise SystemExit(follow(folders, console))


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "submit",
        "RECIPE [options] [flags for all stages or one]",
        "Run a recipe as a job of SLURM. The script is kept in the folder of the run; the job saves and leaves before "
        "its time ends or when it is preempted, and goes on when it starts again. Settings of the site: "
        f"{site_file()}.",
        FLAGS_OF_RUN,
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE-SCALE-TIME)")
    parser.add_argument("--nodes", type=int, default=1, help="number of machines (default: 1)")
    parser.add_argument("--tasks", type=int, help="with --gpus 0: processes of each machine (default: 1)")
    add_job_options(parser)
    parser.add_argument("--array-of", metavar="SEEDS", help="a job array, a run for each seed: 0,1,2 or 0-7")
    parser.add_argument("--wait", action="store_true", help="follow the job, and end with its exit code")
    parser.add_argument("--dry-run", action="store_true", help="check the flags and print the script; submit nothing")
    return parser


def add_job_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of a job that say what it gets; `site_of` reads them."""
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each machine; 0 for none (default: 1)")
    parser.add_argument("--time", help="limit of a job: minutes, HH:MM:SS or D-HH; a run may take several jobs")
    parser.add_argument("--partition", help="partition of the job")
    parser.add_argument("--account", help="account that it is charged to")
    parser.add_argument("--qos", help="quality of service")
    parser.add_argument(
        "--cpus-per-gpu", type=int, help="processor cores for each GPU, or process where there are none"
    )
    parser.add_argument("--mem", help="memory of each machine, such as 200G; 0 for all")
    parser.add_argument("--container", metavar="IMAGE", help="image of a container that has lit-vlm")


def site_of(options: argparse.Namespace) -> Site:
    """The settings of the site under the flags."""
    site = read_site()
    if options.time is not None:
        check_time(options.time, site.signal_before, "--time")
    names = ("partition", "account", "qos", "time", "cpus_per_gpu", "mem")
    return site.model_copy(update={name: value for name in names if (value := getattr(options, name)) is not None})


def _check(options: argparse.Namespace, flags: Sequence[str], array: bool) -> None:
    """Refuse numbers and flags that contradict each other."""
    for name, least in (("nodes", 1), ("gpus", 0), ("tasks", 1), ("cpus_per_gpu", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is at least {least}, not {value}")
    if options.tasks is not None and options.gpus:
        raise ValueError(
            f"--tasks is for machines without GPUs, with --gpus 0: each of the {options.gpus} has a process"
        )
    options.tasks = options.tasks or 1
    for flag in flags:
        bare = flag.partition("=")[0]
        if bare in OWN:
            raise ValueError(f"{bare} is not for lit-vlm submit: use {OWN[bare]}")
        if array and bare == SEED:
            raise ValueError(f"{SEED} and --array-of both say the seed: leave one out")
    if options.out is not None and (bad := re.search(r"[\n\\]", str(options.out))):
        raise ValueError(f"--out {str(options.out)!r}: SLURM takes no {bad[0]!r} in the name of a folder")


def _seeds(text: str) -> tuple[int, ...]:
    """Seeds from `0,1,2` or `0-7`, or both.

    Raises:
        ValueError: for anything else, and for a seed that is named twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        last = int(match[2] or match[1]) if match else 0
        if match is None or last < int(match[1]):
            raise ValueError(f"--array-of {text}: {part!r} is no seed and no range of seeds; write 0,1,2 or 0-7")
        seeds += range(int(match[1]), last + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--array-of {text} names a seed twice, and two runs cannot share a folder")
    return tuple(seeds)


def _state(asked: Asked) -> RunState:
    """What `lit-vlm run` makes of the command in the job, checked as it does."""
    options = asked.options
    devices = options.gpus or options.tasks
    own = ["--trainer.devices", str(devices), "--trainer.num_nodes", str(options.nodes)]
    own += [] if options.gpus else ["--trainer.accelerator", "cpu"]
    return state_of(Asked(asked.recipe, options, [*own, *asked.flags]))


def _words(asked: Asked, state: RunState) -> list[str]:
    """The command of the job, behind `lit-vlm`, but for the folder and the seed."""
    words = ["run", state.recipe]
    for axis in ("scale", "strategy", "stages"):
        if (value := getattr(asked.options, axis)) is not None:
            words += [f"--{axis}", value]
    return [*words, *state.flags]


def refuse_queued(folders: Sequence[Path]) -> None:
    """Refuse a folder whose run is in the queue.

    Raises:
        ValueError: naming the job.
    """
    jobs = {one.job: folder for folder in folders if (one := Submitted.load(folder)) is not None and not one.seeds}
    for job, told in (states(list(jobs)) or {}).items():
        if told.is_live:
            raise ValueError(f"job {job} of {jobs[job]} is {told}: scancel {job} first, or choose another --out")


def put_into_queue(folder: Path, text: str) -> str:
    """Write the script into a folder and submit it; returns the number of the job.

    Raises:
        ValueError: with what sbatch says, where it refuses.
    """
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    file = folder / SCRIPT
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return sbatch(file)


def _submit(folder: Path, text: str, state: RunState, seeds: Sequence[int]) -> str:
    """Submit the script, and note the job in the folder of each run; returns its number."""
    number = put_into_queue(folder, text)
    stages = tuple(state.stages)
    Submitted(number, stages, tuple(seeds)).save(folder)
    for seed in seeds:
        Submitted(f"{number}_{seed}", stages).save(folder / f"seed-{seed}")
    return number
