"""`lit-vlm evaluate`: benchmarks in their official files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID
from rich.table import Table

from lit_vlm.checkpoints.folder import find_checkpoint
from lit_vlm.core.launcher import launch, rendezvous
from lit_vlm.core.precision import choose
from lit_vlm.evaluation.tasks import TASKS, Evaluated, Prompts, Shots, Task, TaskSettings, find_task, run_task
from lit_vlm.evaluation.tasks.base import Choosing


def main(argv: Sequence[str]) -> None:
    """Run each task at each number of demonstrations, and print a table.

    Raises:
        ValueError: for a wrong value of a flag, a missing file, or as `load_run` and `run_task`.
    """
    arguments = _parser().parse_args(argv)
    shots = _shots(arguments.shots)
    for flag in ("batch_size", "limit", "max_length", "max_new_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    if arguments.text_shots and 0 not in shots:
        raise ValueError(f"--text-shots belongs to prompts of 0 shots, and --shots is {arguments.shots}")
    prompts = {
        count: Shots(count, 0 if count else arguments.text_shots, seed=arguments.seed, system=arguments.system)
        for count in shots
    }
    tasks = [_task(name, arguments.data) for name in dict.fromkeys(arguments.task)]
    for task, prompt in product(tasks, prompts.values()):
        Prompts(task, prompt, arguments.choose)  # reads all files before minutes of work
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.evaluation.asker import load_run

    disable_progress_bar()
    device = _join_processes(arguments.device)
    main_process = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(highlight=False, quiet=not main_process)
    checkpoint = find_checkpoint(arguments.checkpoint)
    chosen = (
        getattr(torch, arguments.dtype) if arguments.dtype else choose(torch.device(device).type, scaled=False).dtype
    )
    dtype = str(chosen).removeprefix("torch.")
    console.print(f"weights in {dtype}{'' if arguments.dtype else ', which this device is fast in'}")
    run = load_run(checkpoint, device, chosen)
    length = arguments.max_length or run.format.max_length
    asker = replace(run, format=replace(run.format, max_length=length))
    results: dict[tuple[str, int], Evaluated] = {}
    for task in tasks:
        for count, prompt in prompts.items():
            settings = TaskSettings(
                prompt, arguments.choose, arguments.think, arguments.limit, arguments.batch_size, arguments.workers,
                arguments.max_new_tokens, dtype,
            )  # fmt: skip
            out = arguments.out / task.name / prompt.name
            with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
                bar = progress.add_task(f"{task.name}, {count} shots", total=None)
                show = partial(_show, progress, bar)
                result = run_task(asker, task, settings, out, str(checkpoint.resolve()), on_answer=show)
            results[task.name, count] = result
            console.print(f"{task.name}, {count} shots: {_line(result)}   {out}", soft_wrap=True)
    console.print(_table(results, shots))
    if main_process and not arguments.no_mlflow:
        _log(results, prompts, arguments.checkpoint, dtype, arguments.out)
    if dist.is_initialized():
        dist.destroy_process_group()
    if unwritten := [result.unwritten for result in results.values() if result.unwritten]:
        raise OSError(
            f"answers and scores could not be written: {unwritten[0]}. The same command takes up what there is"
        )


def _parser() -> argparse.ArgumentParser:
    tasks = "\n".join(f"  {name:14} {task.about}\n{'':17}{task.files}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="lit-vlm evaluate",
        description="Score a checkpoint on benchmarks in their official file formats, from local folders. Answers,\n"
        "prompts and settings are saved beside the scores; a run that was cut off goes on where it stopped.\n"
        "On several devices: torchrun --nproc-per-node N -m lit_vlm evaluate ...",
        epilog=f"tasks, and the files in --data/TASK:\n{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or the folder of a run")
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="TASK",
        help="one of those below, or the class path of a task; may be given several times",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("benchmarks"), help="folder with one folder per task (default: benchmarks)"
    )
    parser.add_argument("--shots", default="0", help="demonstrations with pictures, e.g. 0,4 (default: 0)")
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
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of the results (evaluation)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of weights (default: what the device is fast in; scores say which)",
    )
    parser.add_argument("--no-mlflow", action="store_true", help="log nothing to MLflow")
    return parser


def _shots(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"--shots {text!r}: write numbers from 0 on, separated by commas")
    return [int(number) for number in numbers]


def _task(name: str, data: Path) -> Task:
    kind = find_task(name)
    return kind(str(data / kind.name if kind.needs_files else "."))


def _join_processes(device: str | None) -> str:
    """Join the other processes that torchrun or srun started, and choose the device."""
    from lit_vlm.evaluation.asker import pick_device

    started = launch()
    if started.world_size == 1:
        return pick_device(device)
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{started.local_rank % torch.cuda.device_count()}"  # a process may see its own card alone
    device = pick_device(device)
    if device != "cpu":
        torch.cuda.set_device(device)  # NCCL sends objects through the current device
    if not dist.is_initialized():
        host, port = rendezvous()
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        dist.init_process_group("gloo" if device == "cpu" else "nccl", rank=started.rank, world_size=started.world_size)
    return device


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def _line(result: Evaluated) -> str:
    text = f"{result.main} {result.scores[result.main]:.2f} ({result.count:,} examples)"
    if result.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.left_out.items())
        text += f", left out and counted as wrong (where there is wrong): {reasons}"
    if "too_long" in result.left_out:
        text += "; a larger --max-length lets long prompts in"
    return text


def _table(results: dict[tuple[str, int], Evaluated], shots: Sequence[int]) -> Table:
    table = Table()
    table.add_column("task")
    table.add_column("score")
    for count in shots:
        table.add_column(f"{count} shots", justify="right")
    for name in dict.fromkeys(task for task, _ in results):
        main_score = results[name, shots[0]].main
        for score in results[name, shots[0]].scores:
            values = [f"{results[name, count].scores.get(score, float('nan')):.2f}" for count in shots]
            table.add_row(name if score == main_score else "", score, *values)
    return table


def _log(
    results: dict[tuple[str, int], Evaluated], prompts: dict[int, Shots], checkpoint: str, dtype: str, out: Path
) -> None:
    """Report all scores as one run of MLflow."""
    from lit_vlm.training.mlflow_run import MLflowRun
    from lit_vlm.training.mlflow_store import default_uri

    run = MLflowRun(default_uri(), "lit-vlm", "evaluate", {}, out)
    run.params({"checkpoint": checkpoint, "dtype": dtype})
    names = {(task, count): f"{task}/{prompts[count].name}" for task, count in results}
    scores = {
        f"{names[key]}/{score}": value for key, result in results.items() for score, value in result.scores.items()
    }
    run.metrics(scores, step=0)
    run.end("FINISHED")
