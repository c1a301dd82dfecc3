"""`lit-vlm ablate`: variants × seeds of a recipe, equal stages once, and what they show."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live

from lit_vlm.cluster.queue import Submitted, need_sbatch
from lit_vlm.cluster.sbatch import Job, script
from lit_vlm.commands.ablation import FILE, Ablation, make
from lit_vlm.commands.asked import ask, recipe_parser
from lit_vlm.commands.submit import add_job_options, put_into_queue, site_of
from lit_vlm.core.launcher import PREEMPTED
from lit_vlm.experiments.file import SEED, AblationFile, parsed, read_file
from lit_vlm.experiments.live import cost_line, known_seconds, live_table, plan_table, print_states
from lit_vlm.experiments.pool import Pool, Slots, State, Task, last_words
from lit_vlm.training.mlflow_store import absolute_uri, default_uri

YAML = (".yaml", ".yml")
SLURM = "slurm"


def main(argv: Sequence[str]) -> None:
    """Plan an ablation, show the plan, run it and report.

    Raises:
        ValueError: for a wrong file, argument or setting.
        SystemExit: when a run fails, or a signal asks to leave.
    """
    file, options = _read(argv)
    folder = options.out or Path("runs") / _name(argv, file)
    console = Console(highlight=False)
    if options.on == SLURM and not options.dry_run:
        need_sbatch()
    sys.stderr.write("checking the flags and data of all variants ...\n")
    ablation = make(file, folder, options.only or (), here=options.on != SLURM)
    _show_plan(ablation, console)
    if options.on == SLURM:
        _submit(ablation, options, console)
    elif options.dry_run:
        _dry_run(ablation, console)
    else:
        _run(ablation, _slots(options.jobs), console)


def _parser() -> argparse.ArgumentParser:
    parser = recipe_parser(
        "ablate",
        "FILE [options] [flags for all variants]\nRECIPE --vary FLAG=VALUE,VALUE [options] [flags for all variants]\n"
        "--resume --out DIR",
        "Run variants of a recipe for several seeds. Stages that runs have in common train once. The same command goes "
        "on where it stopped, and a changed file runs what is new in it. What a file holds: docs/ablations.md.",
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
    parser.add_argument("--dry-run", action="store_true", help="show the plan and check every variant; train nothing")
    parser.add_argument("--resume", action="store_true", help="go on with the ablation in --out")
    add_job_options(parser.add_argument_group("with --on slurm"))
    return parser


def _read(argv: Sequence[str]) -> tuple[AblationFile, argparse.Namespace]:
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
    is_file = Path(named).suffix in YAML
    if not is_file and not options.vary:
        raise ValueError(
            f"{named} is no file of an ablation, whose name ends in .yaml, and as a recipe it needs something to vary: "
            "--vary model.projector=Linear,MLP"
        )
    given: dict[str, Any] = read_file(Path(named)).model_dump(exclude_unset=True) if is_file else {"recipe": named}
    given |= {key: value for key in ("scale", "strategy") if (value := getattr(options, key)) is not None}
    if asked.stages is not None:
        given["stages"] = asked.stages
    if options.seeds is not None:
        given["seeds"] = _seeds(options.seeds)
    if options.vary:
        given["grid"] = given.get("grid", {}) | dict(_varied(text) for text in options.vary)
    if flags := _flags(asked.flags):
        given["base"] = given.get("base", {}) | flags
    return parsed(given, named if is_file else "lit-vlm ablate"), options


def _name(argv: Sequence[str], file: AblationFile) -> str:
    """A name for the folder, the same for the same command."""
    first = Path(argv[0])
    if first.suffix in YAML:
        return first.stem
    varied = [flag.rpartition(".")[2] for flag in file.grid]
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
        found = yaml.safe_load(values if values.startswith("{") else f"[{values}]")
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
            flags[name] = value if equals else "true"
        else:
            flags[name] = word
    return flags


def _show_plan(ablation: Ablation, console: Console) -> None:
    plan, file = ablation.plan, ablation.file
    runs, trained = len(plan.runs), len(plan.nodes)
    if file.about:
        console.print(file.about, soft_wrap=True)
    console.print(
        f"{len(ablation.states)} variants × {len(file.seeds)} seeds = {runs} runs of {plan.wanted} stages; "
        f"{trained} train, as {plan.wanted - trained} are shared; into {ablation.folder}",
        soft_wrap=True,
    )
    console.print(plan_table(plan))
    console.print(cost_line(plan, known_seconds(plan, _folders(ablation))), soft_wrap=True)


def _folders(ablation: Ablation) -> dict[str, Path]:
    return {node: ablation.stage(node) for node in ablation.plan.nodes}


def _submit(ablation: Ablation, options: argparse.Namespace, console: Console) -> None:
    """Write the script of an array of jobs, each of which takes what is left to do, and submit it."""
    if options.gpus < 0:
        raise ValueError(f"--gpus is at least 0, not {options.gpus}")
    folder, name = ablation.folder, f"ablate-{ablation.folder.name}"
    mlflow = absolute_uri(default_uri())
    words, site = ("ablate", "--resume"), site_of(options)
    job = Job(name, folder, words, 1, options.gpus, 1, site, (), options.jobs or 1, options.container, mlflow)
    text = script(job)
    console.print(text, markup=False, soft_wrap=True)
    if options.dry_run:
        return
    ablation.save()
    number = put_into_queue(folder, text)
    Submitted(number, ()).save(folder)
    console.print(
        f"job {number}: {folder}\nhow it is: lit-vlm status {shlex.quote(str(folder))}\nto end it: scancel {number}",
        soft_wrap=True,
    )


def _dry_run(ablation: Ablation, console: Console) -> None:
    """Check the stages of each variant, and say what is missing.

    Raises:
        SystemExit: where a stage could not start.
    """
    from lit_vlm.commands.dry_run import check_recipe

    wrong = []
    for run, stages in ablation.plan.runs.items():
        if run.seed != ablation.file.seeds[0]:
            continue
        console.rule(run.variant)
        words = {node: ablation.words(ablation.plan.nodes[node]) for node in stages.values()}
        if not check_recipe(words, console):
            wrong.append(run.variant)
    if wrong:
        console.print(f"[red]not ready[/]: {', '.join(wrong)}", soft_wrap=True)
        raise SystemExit(1)


def _slots(jobs: int | None) -> Slots:
    """The GPUs of this machine, each for one process; without, so many processes as were asked for."""
    from lit_vlm.commands.apart import apart

    gpus = apart(_gpus, None)
    if gpus and jobs is not None:
        raise ValueError(f"--jobs is for machines without GPUs; here are {len(gpus)}, and each has a run of its own")
    return Slots(gpus, jobs or 1)


def _gpus(_: None) -> tuple[str, ...]:
    """Names of the GPUs that this process may use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else []
    return tuple(names or map(str, range(torch.cuda.device_count()))) if torch.cuda.is_available() else ()


def _run(ablation: Ablation, slots: Slots, console: Console) -> None:
    tasks = ablation.tasks(ablation.file.seeds, {})
    ablation.save()
    pool = _go(ablation, tasks, slots, console)
    ablation.save()
    _end(ablation, tasks, pool, console)


def _go(ablation: Ablation, tasks: Sequence[Task], slots: Slots, console: Console) -> Pool:
    """Run the tasks, and show how they are."""
    folders, before = _folders(ablation), dict[str, State]()
    with Live(console=console, refresh_per_second=2, transient=True) as live:

        def show() -> None:
            if console.is_terminal:
                live.update(live_table(ablation.plan, tasks, pool.states, folders, slots.count))
            else:
                print_states(console, tasks, pool.states, before)

        with Pool(slots, show) as pool:
            pool.run(tasks)
    return pool


def _end(ablation: Ablation, tasks: Sequence[Task], pool: Pool, console: Console) -> None:
    """Say what failed.

    Raises:
        SystemExit: where something failed, or a signal asked to leave.
    """
    if pool.asked is not None:
        console.print(f"left, as {pool.asked} asked it to: the same command goes on")
        raise SystemExit(130 if pool.asked == "SIGINT" else PREEMPTED)
    failed = [task for task in tasks if pool.states[task.name] is State.FAILED]
    for task in failed:
        console.print(
            f"[red]{task.name} ended with exit code {pool.codes[task.name]}[/]: {last_words(task.log)}  ({task.log})",
            soft_wrap=True,
        )
    if failed:
        left = sum(state is State.LEFT_OUT for state in pool.states.values())
        console.print(f"{len(failed)} failed, {left} were left out for it; the same command tries them again")
        raise SystemExit(1)
