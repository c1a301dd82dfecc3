"""`lit-vlm probe`: how well a teacher's features can be predicted from each layer of trained models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lit_vlm.checkpoints.folder import find_checkpoint, run_folder
from lit_vlm.commands.named_runs import RUN_HELP, name_checkpoint
from lit_vlm.evaluation.probe import ProbeResult, ProbeSettings, draw, probe
from lit_vlm.heads import Head
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import KnownMap, MapName, Teacher

KNOWN: dict[str, MapName] = {"depth": "depth", "seg": "segmentation"}
"""Target → the exact map of generated scenes that it may be."""


def main(argv: Sequence[str]) -> None:
    """Probe each checkpoint, print a table, draw the curves, and log them.

    Raises:
        ValueError: for a wrong value of a flag, a target that no run has, or as `load_run` and `probe`.
    """
    arguments = _parser().parse_args(argv)
    if arguments.steps < 1 or arguments.held_out < 1 or arguments.batch_size < 1:
        raise ValueError("--steps, --held-out and --batch-size must be at least 1")
    from transformers.utils.logging import disable_progress_bar

    from lit_vlm.data import Pictures, Source
    from lit_vlm.data.feed.split import split
    from lit_vlm.evaluation.asker import load_run, pick_device
    from lit_vlm.worlds import Scenes

    disable_progress_bar()
    console = Console(highlight=False)
    device = pick_device(arguments.device)
    labels = [str(path) for path in dict.fromkeys(arguments.checkpoints)]
    settings = ProbeSettings(arguments.steps, arguments.batch_size, arguments.lr, arguments.held_out, arguments.seed)
    train: Source
    held_out: Source
    if arguments.images:
        train, held_out = split(Pictures(arguments.images), 0.1, arguments.workers)
    else:
        scenes = {"size": arguments.size, "max_things": 3, "maps": arguments.cells}
        train = Scenes("captions", settings.steps * settings.batch_size, **scenes)
        held_out = Scenes("captions", settings.held_out, split="held_out", **scenes)
    checkpoints = {label: name_checkpoint(label) for label in labels}
    found_by: dict[str, ProbeResult] = {}
    teacher: Teacher | None = None
    # Runs that have a teacher first, as one model is in memory at a time.
    for label in sorted(labels, key=lambda label: not _has_head(checkpoints[label], arguments.target)):
        run = load_run(checkpoints[label], device)
        teacher = teacher or _teacher(arguments, run.module.vlm)
        with Progress(console=console) as progress:
            task = progress.add_task(f"probing {label}", total=settings.steps)
            for found in probe(run, teacher, train, held_out, settings, arguments.workers):
                if isinstance(found, ProbeResult):
                    found_by[label] = found
                else:
                    progress.update(task, completed=found)
        del run
    assert teacher is not None
    results = {label: found_by[label] for label in labels}
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    saved = {"target": arguments.target, "teacher": teacher.identity(), "settings": asdict(settings)}
    saved |= {"results": {label: asdict(result) for label, result in results.items()}}
    (out / "probe.json").write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    draw(results, f"what is known of {arguments.target}", out / "probe.png")
    console.print(_table(results, arguments.target))
    if not arguments.no_mlflow:
        _log(results, arguments, saved)
    console.print(f"curves: {out / 'probe.png'}   figures: {out / 'probe.json'}", soft_wrap=True)


def _has_head(source: str, name: str) -> bool:
    """Whether the run's config has a head of this name."""
    config = yaml.safe_load((run_folder(find_checkpoint(source)) / "config.yaml").read_text(encoding="utf-8"))
    return bool((config["model"].get("heads") or {}).get(name))


def _teacher(arguments: argparse.Namespace, model: VLM) -> Teacher:
    """The teacher of the model's head named `--target`, or one that gives exact maps."""
    target, pictures = arguments.target, arguments.images is not None
    head = dict(model.heads.items()).get(target)
    teacher = head.teacher if isinstance(head, Head) and not arguments.exact else None
    if teacher is not None and not (pictures and teacher.known):
        return teacher
    if target in KNOWN and not pictures:
        return KnownMap(KNOWN[target])
    raise ValueError(
        f"--target {target}: none of these runs has a head of that name whose teacher sees pictures, and exact maps of "
        f"{', '.join(KNOWN)} come with generated scenes only"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-vlm probe",
        description="Train one small resampler per decoder layer on the frozen states of each model, towards a "
        "teacher's features, and show how well they can be read: the cosine, and for exact maps the share of right "
        "depth orders or the mIoU. The teacher is that of the head of this name in the recipe of one of the runs, "
        "otherwise exact maps.",
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="RUN", help=f"{RUN_HELP}; all are compared")
    parser.add_argument("--target", required=True, help="depth, seg, gen, or another head of the recipe")
    parser.add_argument("--images", help="a folder or address of pictures (default: generated scenes)")
    parser.add_argument("--exact", action="store_true", help="take the exact maps of scenes, for depth and seg")
    parser.add_argument("--size", type=int, default=96, help="pixels of a scene's side (96)")
    parser.add_argument("--cells", type=int, default=6, help="cells per side of exact maps (6)")
    parser.add_argument("--steps", type=int, default=300, help="steps of training (300)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per step (16)")
    parser.add_argument(
        "--lr", type=float, default=1e-2, help="peak learning rate (1e-2; 1e-3 for 5,000 steps or more)"
    )
    parser.add_argument("--held-out", type=int, default=256, help="scenes to measure on (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the probes and the order of pictures (0)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (0)")
    parser.add_argument("--out", type=Path, default=Path("probe"), help="folder of the results (probe)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--no-mlflow", action="store_true", help="log nothing to MLflow")
    return parser


def _table(results: Mapping[str, ProbeResult], target: str) -> Table:
    table = Table(title=f"what is known of {target}, by decoder layer")
    table.add_column("")
    first = next(iter(results.values()))
    for layer in range(1, len(first.cosine) + 1):
        table.add_column(str(layer), justify="right")
    for label, result in results.items():
        table.add_row(f"{label}: cosine", *(f"{value:.3f}" for value in result.cosine))
        if result.score:
            table.add_row(f"{label}: {result.score_name}", *(f"{value:.1%}" for value in result.score))
    return table


def _log(results: Mapping[str, ProbeResult], arguments: argparse.Namespace, saved: dict[str, object]) -> None:
    """Report a run of MLflow for each model; steps of its curves are layers."""
    from lit_vlm.training.mlflow_run import MLflowRun
    from lit_vlm.training.mlflow_store import default_uri

    for label, result in results.items():
        run = MLflowRun(default_uri(), "lit-vlm", f"probe {arguments.target}", {}, arguments.out)
        run.params({"checkpoint": label, "target": arguments.target, "teacher": str(saved["teacher"])})
        for name, values in (("probe/cosine", result.cosine), ("probe/score", result.score)):
            for layer, value in enumerate(values, 1):
                run.metrics({name: value}, step=layer)
        run.file(arguments.out / "probe.png")
        run.end("FINISHED")
