"""`lit-vlm ablate`: variants × seeds of a recipe, equal stages once, and what they show."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from lit_vlm.cluster.queue import Submitted, need_sbatch
from lit_vlm.cluster.sbatch import Job, script
from lit_vlm.commands.ablation import Ablation, make, opened
from lit_vlm.commands.ablation_asked import FINDINGS, SLURM, name_for, read
from lit_vlm.commands.ablation_runs import Tracked, is_decided, report, runs_of, study_of
from lit_vlm.commands.submit import put_into_queue, refuse_queued, site_of
from lit_vlm.core.launcher import ASKING, PREEMPTED
from lit_vlm.core.written import write_whole
from lit_vlm.experiments.live import cost_line, known_seconds, live_table, plan_table, print_states
from lit_vlm.experiments.pool import Pool, Slots, State, Task, last_words
from lit_vlm.experiments.report import findings, findings_table
from lit_vlm.experiments.report.words import headline
from lit_vlm.experiments.statistics import planned_looks
from lit_vlm.training.mlflow_store import absolute_uri, default_uri

COMMAND = "command.txt"
"""The command that an ablation was begun with, in its folder."""


def main(argv: Sequence[str]) -> None:
    """Plan an ablation, show the plan, run it and report.

    Raises:
        ValueError: for a wrong file, argument or setting.
        SystemExit: when a run fails, or a signal asks to leave.
    """
    if argv[:1] == [FINDINGS]:
        _findings(argv[1:])
        return
    for one in ASKING:  # as later on, and before there is anything to save
        signal.signal(one, lambda *_: sys.exit(PREEMPTED))
    file, options = read(argv)
    folder = options.out or Path("runs") / name_for(argv, file)
    console = Console(highlight=False)
    if options.on == SLURM and not options.dry_run:
        need_sbatch()
    sys.stderr.write(f"checking the flags {'of' if options.dry_run else 'and data of'} all variants ...\n")
    # What a dry run lists is missing data, too.
    ablation = make(file, folder, here=options.on != SLURM, data=not options.dry_run)
    _show_plan(ablation, console)
    if options.on == SLURM:
        _submit(ablation, options, console, argv)
    elif options.dry_run:
        _dry_run(ablation, console)
    else:
        _keep_command(folder, argv)
        _run(ablation, _slots(options.jobs), console, options.only or ())


def _findings(folders: Sequence[str]) -> None:
    """Print a Markdown table of the claims of several ablations, for a page of documentation."""
    if not folders:
        raise ValueError(f"{FINDINGS} DIR...: name the folders of ablations")
    studies = []
    for folder in map(Path, folders):
        ablation = opened(folder)
        study = study_of(ablation, runs_of(ablation, ablation.file.seeds), _command(folder))
        if study is None:
            raise ValueError(f"{folder} has no finished run yet: lit-vlm ablate --resume --out {folder}")
        studies.append(study)
    sys.stdout.write(findings_table(studies))


def _keep_command(folder: Path, argv: Sequence[str]) -> None:
    """Write the command into the folder, unless it goes on with what is there."""
    if "--resume" not in argv or not (folder / COMMAND).is_file():
        write_whole(folder / COMMAND, f"lit-vlm ablate {shlex.join(argv)}\n")


def _command(folder: Path) -> str:
    """The command that an ablation was begun with."""
    return (folder / COMMAND).read_text(encoding="utf-8").strip() if (folder / COMMAND).is_file() else ""


def _show_plan(ablation: Ablation, console: Console) -> None:
    plan, file = ablation.plan, ablation.file
    runs, trained = len(plan.runs), len(plan.nodes)
    if file.about:
        console.print(file.about, soft_wrap=True, markup=False)
    console.print(
        f"{len(ablation.states)} variants × {len(file.seeds)} seeds = {runs} runs of {plan.wanted} stages; "
        f"{trained} train, as {plan.wanted - trained} are shared; into {ablation.folder}",
        soft_wrap=True,
        markup=False,
    )
    console.print(plan_table(plan))
    seconds = known_seconds(plan, _folders(ablation), ablation.earlier())
    console.print(cost_line(plan, seconds), soft_wrap=True)
    for claim in file.claims:
        console.print(
            f"claim: {claim.text} ({claim.better} over {claim.worse}, {claim.score})", soft_wrap=True, markup=False
        )
    for line in ablation.remarks:
        console.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)


def _folders(ablation: Ablation) -> dict[str, Path]:
    return {node: ablation.stage(node) for node in ablation.plan.nodes}


def _submit(ablation: Ablation, options: argparse.Namespace, console: Console, argv: Sequence[str]) -> None:
    """Write the script of an array of jobs, each of which takes what is left to do, and submit it."""
    if options.gpus < 0:
        raise ValueError(f"--gpus is at least 0, not {options.gpus}")
    folder, name = ablation.folder, f"ablate-{ablation.folder.name}"
    mlflow = absolute_uri(default_uri())
    words = ["ablate", "--resume"]
    words += [word for variant in options.only or () for word in ("--only", variant)]
    workers, site = options.jobs or 1, site_of(options)
    job = Job(name, folder, words, 1, options.gpus, 1, site, (), workers, options.container, mlflow)
    text = script(job)
    console.print(text, markup=False, soft_wrap=True)
    if options.dry_run:
        return
    refuse_queued([folder])
    _keep_command(folder, argv)
    with Tracked(ablation) as tracked:
        ablation.save(tracked.run_id)
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
    from lit_vlm.commands.dry_run import Checked, check_recipe

    wrong, known = [], dict[str, Checked]()
    for run, stages in ablation.plan.runs.items():
        if run.seed != ablation.file.seeds[0]:
            continue
        console.rule(run.variant)
        words = {node: ablation.words(ablation.plan.nodes[node]) for node in stages.values()}
        if not check_recipe(words, console, known):
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
    from lit_vlm.core.devices import visible_gpus

    return visible_gpus()


def _run(ablation: Ablation, slots: Slots, console: Console, only: Sequence[str]) -> None:
    """Run what is left to do, one seed after the other where each is to be judged, and report."""
    seeds = ablation.file.seeds
    with Tracked(ablation) as tracked:
        ablation.save(tracked.run_id)
        for count in planned_looks(seeds).seeds if ablation.file.sequential else [len(seeds)]:
            tasks = ablation.tasks(seeds[:count], tracked.environment, only)
            pool = _go(ablation, tasks, slots, console)
            decided, error = False, None
            if pool.asked is None:
                try:
                    decided = _report(ablation, seeds[:count], tracked, console)
                except Exception as raised:  # whatever it is, runs are kept, and what failed of them is said
                    error = raised
            _end(tasks, pool, tracked, console)
            if error is not None:
                raise ValueError(
                    f"no report: {error}; the runs are kept, and the same command makes it again"
                ) from error
            if decided:
                break
        tracked.end("FINISHED")


def _report(ablation: Ablation, seeds: Sequence[int], tracked: Tracked, console: Console) -> bool:
    """Write the report, and say what it says; whether every claim is decided.

    Raises:
        ValueError: where there is none; runs are kept, and the same command makes it again.
    """
    ablation.save(tracked.run_id)
    study = study_of(ablation, runs_of(ablation, seeds), _command(ablation.folder))
    if study is None:
        return False
    files = report(ablation, study, tracked)
    for finding in findings(study):
        share = study.example(finding.claim.score).share if finding.judged is not None else False
        console.print(headline(finding, share), soft_wrap=True, markup=False)
    console.print(f"report: {', '.join(map(str, files))}", soft_wrap=True, markup=False)
    return is_decided(study)


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


def _end(tasks: Sequence[Task], pool: Pool, tracked: Tracked, console: Console) -> None:
    """Say what failed.

    Raises:
        SystemExit: where something failed, or a signal asked to leave.
    """
    if pool.asked is not None:
        what = f"left, as {pool.asked} asked it to"
        tracked.preempted(what)
        console.print(f"{what}: the same command goes on")
        raise SystemExit(130 if pool.asked == "SIGINT" else PREEMPTED)
    failed = [task for task in tasks if pool.states[task.name] is State.FAILED]
    for task in failed:
        console.print(
            f"[red]{task.name} ended with exit code {pool.codes[task.name]}[/]: {escape(last_words(task.log))}  "
            f"({escape(str(task.log))})",
            soft_wrap=True,
        )
    if failed:
        left = sum(state is State.LEFT_OUT for state in pool.states.values())
        tracked.end("FAILED")
        console.print(f"{len(failed)} failed, {left} were left out for it; the same command tries them again")
        raise SystemExit(1)
