"""`lit-vlm evaluate`: benchmarks in their official files, and questions of one's own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from rich.console import Console

from lit_vlm.commands.evaluated import Results, changed, line, log_scores, release, table
from lit_vlm.commands.named_runs import RUN_HELP, Named, find_named, labels
from lit_vlm.core.bits import Kind
from lit_vlm.core.launcher import launch, rendezvous
from lit_vlm.core.precision import choose
from lit_vlm.core.progress import progress, slowly
from lit_vlm.core.quantised import check_kind
from lit_vlm.evaluation.asker import Asker, load_run, pick_device
from lit_vlm.evaluation.tasks import (
    TASKS,
    Prompts,
    RecordFile,
    Scoring,
    Shots,
    Task,
    TaskSettings,
    find_task,
    run_task,
)
from lit_vlm.evaluation.tasks.base import Choosing
from lit_vlm.training.launched import keep_attempts_apart


def main(argv: Sequence[str]) -> None:
    """Run each task at each number of demonstrations on each checkpoint, and print a table.

    Raises:
        ValueError: for a wrong value of a flag, a missing file, or as `load_run` and `run_task`.
    """
    arguments = _parser().parse_args(argv)
    named, asked = _named(arguments.checkpoints), _asked(arguments)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = _join_processes(arguments.device)
    main_process = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(highlight=False, quiet=not main_process)
    chosen = (
        getattr(torch, arguments.dtype) if arguments.dtype else choose(torch.device(device).type, scaled=False).dtype
    )
    dtype = str(chosen).removeprefix("torch.")
    console.print(f"weights in {dtype}{'' if arguments.dtype else ', which this device is fast in'}")
    work = [
        (task, TaskSettings(prompt, arguments.choose, arguments.think, arguments.limit, arguments.batch_size,
                            arguments.workers, arguments.max_new_tokens, dtype))
        for task, prompt in asked
    ]  # fmt: skip
    results: dict[str, Results] = {}
    for label, one in zip(labels(named), named, strict=True):
        out = one.results()
        if arguments.out is not None:
            out = arguments.out / label if len(named) > 1 else arguments.out
        if one.note:
            console.print(one.note, soft_wrap=True)
        results[label] = {}
        for kind in dict.fromkeys((None, arguments.quantise)):
            with slowly(f"loading {one.checkpoint}", shown=main_process):
                asker = load_run(one.checkpoint, device, chosen, kind)
            length = arguments.max_length or asker.format.max_length
            asker = replace(asker, format=replace(asker.format, max_length=length))
            stored = [(task, replace(settings, quantise=kind)) for task, settings in work]
            results[label] |= _evaluate(asker, one, stored, out, not arguments.overwrite, console)
            del asker  # its memory is for the next one
            release(device)
        if main_process and not arguments.no_mlflow:
            log_scores(one, results[label], dtype, out)
        whole = not any(result.unwritten for result in results[label].values())
        for task, settings in work if arguments.quantise and main_process and whole else ():
            said = changed(out / task.name, settings.name, arguments.quantise)
            console.print(f"{label}: {said}" if len(named) > 1 else said, soft_wrap=True)
    console.print(table(results))
    if dist.is_initialized():
        dist.destroy_process_group()
    if unwritten := [one.unwritten for found in results.values() for one in found.values() if one.unwritten]:
        raise OSError(
            f"answers and scores could not be written: {unwritten[0]}. The same command takes up what there is, and "
            "--out names another folder"
        )


def _named(sources: Sequence[str]) -> list[Named]:
    """The checkpoints of runs; one that is named twice is there once."""
    found: dict[Path, Named] = {}
    for source in sources:
        one = find_named(source)
        found.setdefault(one.checkpoint.resolve(), one)
    return list(found.values())


def _asked(arguments: argparse.Namespace) -> list[tuple[Task, Shots]]:
    """What is asked, each task with each number of demonstrations; raises as `main`."""
    shots = _shots(arguments.shots)
    _check(arguments, shots)
    prompts = [
        Shots(count, 0 if count else arguments.text_shots, seed=arguments.seed, system=arguments.system)
        for count in shots
    ]
    asked = list(product(_tasks(arguments), prompts))
    with slowly("reading questions", launch().is_first):
        for task, prompt in asked:
            Prompts(task, prompt, arguments.choose)  # reads all files before minutes of work
    return asked


def _evaluate(
    asker: Asker,
    named: Named,
    work: Sequence[tuple[Task, TaskSettings]],
    out: Path,
    resume: bool,
    console: Console,
) -> Results:
    """Run tasks on one checkpoint, each with a bar and a line of its own."""
    results: Results = {}
    for task, settings in work:
        name = f"{task.name}, {settings.prompt.shots} shots{f', {settings.quantise}' if settings.quantise else ''}"
        folder = out / task.name / settings.name
        with ExitStack() as stack:
            show = _Bar(stack, name, not console.quiet)
            result = run_task(asker, task, settings, folder, str(named.checkpoint.resolve()), resume, show)
        results[task.name, settings.name] = result
        console.print(f"{name}: {line(result)}   {folder}", soft_wrap=True)
    return results


def _check(arguments: argparse.Namespace, shots: Sequence[int]) -> None:
    """Refuse flags that make no sense together; raises ValueError naming them."""
    check_kind(arguments.quantise, "--quantise")
    for flag in ("batch_size", "limit", "max_length", "max_new_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    if arguments.text_shots and 0 not in shots:
        raise ValueError(f"--text-shots belongs to prompts of 0 shots, and --shots is {arguments.shots}")
    if not arguments.task and not arguments.file:
        raise ValueError("name what is asked: --task for a benchmark, --file for questions of your own")
    for flag in ("score", "demonstrations"):
        if getattr(arguments, flag) and not arguments.file:
            raise ValueError(f"--{flag} belongs to questions of --file, and there is none")
    if arguments.demonstrations and not any(shots) and not arguments.text_shots:
        raise ValueError("--demonstrations are put into prompts by --shots, which is 0")


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    """The benchmarks and the files of questions; raises ValueError where two have one name, as their results do."""
    tasks = [_task(name, arguments.data) for name in dict.fromkeys(arguments.task)]
    tasks += [RecordFile(file, arguments.score, arguments.demonstrations) for file in dict.fromkeys(arguments.file)]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two of what is asked are called {twice[0]}, as their results would be: rename a file")
    return tasks


def _parser() -> argparse.ArgumentParser:
    tasks = "\n".join(f"  {name:14} {task.about}\n{'':17}{task.files}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="lit-vlm evaluate",
        description="Score checkpoints on benchmarks in their official file formats, from local folders, or on\n"
        "questions of your own. Answers, prompts and settings are saved beside the scores; what was cut off goes on\n"
        "where it stopped.\n"
        "On several devices: torchrun --nproc-per-node N -m lit_vlm evaluate ...",
        epilog=f"tasks, and the files in --data/TASK:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="RUN",
        help=RUN_HELP,
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="TASK",
        help="one of those below, or the class path of a task; may be given several times",
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="questions of your own: a .jsonl file of records (docs/data.md); may be given several times",
    )
    parser.add_argument(
        "--score",
        choices=get_args(Scoring),
        help="of answers to --file: exact match, VQA accuracy, choice of an option, ANLS, relaxed accuracy (numbers "
        "within 5 %%), F1 of words (default: choice where records have options, else exact)",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("benchmarks"), help="folder with one folder per task (default: benchmarks)"
    )
    parser.add_argument("--shots", default="0", help="demonstrations with pictures, e.g. 0,4 (default: 0)")
    parser.add_argument(
        "--demonstrations", metavar="FILE", help="records that those of --file are taken from (default: its others)"
    )
    parser.add_argument(
        "--text-shots",
        type=int,
        default=0,
        help='demonstrations without pictures in prompts of 0 shots; VILA\'s "0-shot" has 2 (default: 0)',
    )
    parser.add_argument("--system", help='system text; "" for none (default: that of the run)')
    parser.add_argument(
        "--choose",
        choices=get_args(Choosing),
        help="of several options: write the letter, or take the likeliest letter or option (default: the task's way)",
    )
    parser.add_argument("--think", action="store_true", help="let the model write steps before its answer")
    parser.add_argument("--limit", type=int, help="so many examples, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of demonstrations and --limit (default: 42)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples at a time; no score depends on it (16)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode pictures (2)")
    parser.add_argument("--max-length", type=int, help="positions of a prompt at most (default: that of the run)")
    parser.add_argument("--max-new-tokens", type=int, help="length of an answer at most (default: the task's)")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: evaluation/ in the folder of each stage)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="ask anew and replace answers that are there (default: go on with them)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of weights (default: what the device is fast in; scores say which)",
    )
    parser.add_argument(
        "--quantise",
        choices=get_args(Kind),
        help="ask twice, as trained and with the linear layers of all blocks in 4 or 8 bits, and say what that changes",
    )
    parser.add_argument("--no-mlflow", action="store_true", help="report no score to MLflow")
    return parser


def _shots(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"--shots {text!r}: write numbers from 0 on, separated by commas")
    return [int(number) for number in numbers]


def _task(name: str, data: Path) -> Task:
    kind = find_task(name)
    if kind is RecordFile:
        raise ValueError("--task file: questions of your own are named by --file FILE")
    return kind(str(data / kind.name if kind.needs_files else "."))


def _join_processes(device: str | None) -> str:
    """Join the other processes that torchrun or srun started, and choose the device."""
    started = launch()
    if started.world_size == 1:
        return pick_device(device)
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{started.local_rank % torch.cuda.device_count()}"  # a process may see its own card alone
    device = pick_device(device)
    if device != "cpu":
        torch.cuda.set_device(device)  # NCCL sends objects through the current device
    if not dist.is_initialized():
        if started.by == "torchrun":
            keep_attempts_apart(started.attempt)
        host, port = rendezvous()
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        dist.init_process_group("gloo" if device == "cpu" else "nccl", rank=started.rank, world_size=started.world_size)
    return device


class _Bar:
    """Shows how many questions are answered, once it is known how many are to be asked."""

    def __init__(self, stack: ExitStack, title: str, shown: bool) -> None:
        self._stack, self._title, self._shown = stack, title, shown
        self._advance: Callable[[int], None] | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        if self._advance is None:
            self._advance = self._stack.enter_context(progress(self._title, total, shown=self._shown))
        self._advance(done - self._done)
        self._done = done
