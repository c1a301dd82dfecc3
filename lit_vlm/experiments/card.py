"""The model card of an exported run: what it is, how it was trained, on what, and what it scores."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from scipy import stats

from lit_vlm import __version__
from lit_vlm.checkpoints.folder import find_checkpoint, run_folder, step_of
from lit_vlm.checkpoints.progress import Progress
from lit_vlm.data.sources.provenance import Provenance
from lit_vlm.experiments.report import words
from lit_vlm.experiments.report.tables import Table, markdown_table
from lit_vlm.experiments.results import Score
from lit_vlm.experiments.stage_scores import stage_scores
from lit_vlm.experiments.tracked import Tracked, read_tracked

SEEN = "data/samples/"
LEVEL = 0.95
SLOTS = ("encoder", "projector", "embedder", "decoder")
HUB_DATASET = re.compile(r"(?:hf://|https://huggingface\.co/)datasets/([^/@?#]+/[^/@?#]+)")
LIBRARIES = {"hf": "transformers", "peft": "peft", "llava-hf": "transformers", "gguf": "gguf"}
"""Format → what hubs call the library that loads it; other formats are loaded by code of their own."""


@dataclass(frozen=True)
class Stage:
    """One stage of the chain that led to a checkpoint.

    Attributes:
        folder: where it lies.
        config: its resolved config.
        tracked: what MLflow keeps of it.
    """

    folder: Path
    config: Mapping[str, Any]
    tracked: Tracked


def model_card(source: str | Path, format_name: str, command: str, rounded: str | None = None) -> str:
    """The card of a checkpoint, as Markdown with the head that model hubs read.

    Args:
        source: a checkpoint, or the folder of a run.
        format_name: the format that it was exported in.
        command: the command that exported it.
        rounded: type that weights were rounded to; None: they are those that were scored.

    Raises:
        ValueError: when there is no complete checkpoint, or a file of scores that cannot be read.
    """
    checkpoint = find_checkpoint(source)
    stages = list(_chain(run_folder(checkpoint)))
    last = stages[-1]
    bases = sorted({name for part in SLOTS for name in _hub_names(last.config["model"].get(part))})
    sections = [
        _head(bases, _hub_datasets(stages), last, format_name),
        f"# {_title(last)}",
        f"A vision-language model, trained with lit-vlm {__version__} and exported as `{format_name}`: `{command}`, "
        f"from step {step_of(checkpoint)} of stage `{last.config['model']['stage']['name']}`.",
        "## Parts\n\n" + _table(("slot", "part", "from"), _parts(last.config)),
        "## Training\n\n" + _table(*_training(stages)) + _frozen(stages),
        "## Data\n\n" + _table(*_data(stages)) + "\n\n" + _licences(stages),
        "## Scores\n\n" + _scores(last.folder) + _of_others(rounded),
        "## Limits\n\n" + _limits(last, bases),
        "## Origin\n\n" + _origin(stages),
    ]
    return "\n\n".join(sections) + "\n"


def _chain(folder: Path) -> Iterator[Stage]:
    """The stages from the first whose folder is there to the one in `folder`."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    start = config["model"]["stage"].get("start_from")
    if start and ":" not in str(start):
        before = _found(str(start), folder)
        if before is not None:
            yield from _chain(before)
    yield Stage(folder, config, read_tracked(folder, (SEEN,)))


def _found(start: str, folder: Path) -> Path | None:
    """The folder of the stage before: as it was named, or beside its successor where the run was moved."""
    for candidate in (Path(start), folder.parent / Path(start).name):
        try:
            before = run_folder(find_checkpoint(candidate))
        except ValueError:
            continue
        itself = before.resolve() == folder.resolve()  # a stage that began from one of the same name, which is gone
        if not itself and (before / "config.yaml").is_file():
            return before
    return None


def _head(bases: Sequence[str], datasets: Sequence[str], last: Stage, format_name: str) -> str:
    content: dict[str, Any] = {"pipeline_tag": "image-text-to-text", "tags": ["lit-vlm", *_system(last)]}
    if format_name in LIBRARIES:
        content["library_name"] = LIBRARIES[format_name]
    if bases:
        content["base_model"] = list(bases)
    if datasets:
        content["datasets"] = list(datasets)
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _system(last: Stage) -> list[str]:
    """The recipe, where the run is of `lit-vlm run`."""
    file = last.folder.absolute().parent / "run.json"
    return [str(json.loads(file.read_text(encoding="utf-8"))["recipe"])] if file.is_file() else []


def _title(last: Stage) -> str:
    return " ".join([*_system(last), last.folder.absolute().parent.name, last.folder.name])


def _hub_names(part: Any) -> Iterator[str]:
    """Names of pretrained models in the settings of a part: `name` and `pretrained`, if they look like a hub's."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            hub = isinstance(value, str) and value.count("/") == 1 and not value.startswith((".", "/"))
            if key in ("name", "pretrained") and hub:
                yield str(value)
            else:
                yield from _hub_names(value)
    elif isinstance(part, list):
        for entry in part:
            yield from _hub_names(entry)


def _parts(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for slot in SLOTS:
        part = config["model"].get(slot) or {}
        given = part.get("init_args") or {}
        origin = given.get("pretrained") or given.get("name") or "–"
        rows.append((slot, f"`{part.get('class_path', '–').rpartition('.')[2]}`", f"`{origin}`"))
    heads = config["model"].get("heads") or {}
    if heads:
        rows.append(("heads", ", ".join(f"`{name}`" for name in heads), "left behind: they serve training alone"))
    return rows


# ---------------------------------------------------------------------- training and data


def _training(stages: Sequence[Stage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What trained in each stage, how long, and what it took."""
    head = ("stage", "trains (peak learning rate)", "parameters", "losses", "steps", "time", "devices", "peak memory")
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        settings = stage.config["model"]["stage"]
        trains = {slot: rate for slot, rate in settings["train"].items() if rate is not None}
        progress = Progress.read(stage.folder)
        rows.append(
            (
                f"`{settings['name']}`",
                ", ".join(f"{slot} ({rate:g})" for slot, rate in trains.items()),
                words.count(progress.trained) if progress else "–",
                ", ".join(f"{name} × {weight:g}" for name, weight in settings["losses"].items()),
                f"{progress.step:,}" if progress else "–",
                words.hours(progress.seconds if progress else math.nan),
                str(progress.devices or "–") if progress else "–",
                words.size(progress.peak_bytes if progress else None),
            )
        )
    return head, rows


def _frozen(stages: Sequence[Stage]) -> str:
    """How much of each slot trained and how much did not, of the stages that tell it; nothing where none does."""
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        progress = Progress.read(stage.folder)
        for slot, (trained, frozen) in (progress.slots if progress else {}).items():
            rows.append((f"`{stage.config['model']['stage']['name']}`", slot, f"{trained:,}", f"{frozen:,}"))
    return f"\n\n{_table(('stage', 'slot', 'trained parameters', 'frozen'), rows)}" if rows else ""


def _data(stages: Sequence[Stage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The sources of each stage, those that are held out as well."""
    head = ("stage", "use", "source", "read by", "samples seen", "fingerprint")
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        seen = {name.removeprefix(SEEN): points[-1] for name, points in stage.tracked.curves.items() if points}
        known = {key.removeprefix("data."): value for key, value in stage.tracked.origin.items() if "/" in key}
        for use in ("train", "val"):
            classes = _classes(stage.config["data"].get(use))
            names = [name.partition("/")[2] for name in known if name.startswith(f"{use}/")]
            for index, name in enumerate(names or (["–"] if classes else [])):
                by = classes[index : index + 1] if len(classes) == len(names) else classes
                drawn = "–"
                if use == "train" and name in seen:
                    step, count = seen[name]
                    drawn = f"{count:,.0f} by step {step:,}"
                cells = (f"`{stage.config['model']['stage']['name']}`", use, name, ", ".join(f"`{one}`" for one in by))
                rows.append((*cells, drawn, known.get(f"{use}/{name}", "–")))
    return head, rows


def _hub_datasets(stages: Sequence[Stage]) -> list[str]:
    """Data sets of the hub that were trained on, as it names them."""
    origins = [
        provenance.get("origin", "")
        for stage in stages
        for source, provenance in stage.tracked.provenance.items()
        if source.startswith("train/")
    ]
    return sorted({found[1] for origin in origins if (found := HUB_DATASET.match(origin))})


def _licences(stages: Sequence[Stage]) -> str:
    """A table of where each source comes from, and which do not say it."""
    known: dict[str, Mapping[str, str]] = {}
    for stage in stages:
        for source, provenance in stage.tracked.provenance.items():
            name = source.partition("/")[2]
            known[name] = {**known.get(name, {}), **provenance}
    rows = [(name, *(one.get(field.name, "–") for field in fields(Provenance))) for name, one in known.items() if one]
    table = _table(("source", *(field.name for field in fields(Provenance))), rows) + "\n\n" if rows else ""
    unknown = [name for name, one in known.items() if "licence" not in one]
    if not known:
        return "Licences of data were not recorded: name them here."
    return table + (f"No licence was recorded of {', '.join(unknown)}: name it here." if unknown else "")


def _classes(given: Any) -> list[str]:
    entries = given.values() if isinstance(given, Mapping) else given or ()
    return [str(one["class_path"]).rpartition(".")[2] for one in entries if one]


# ---------------------------------------------------------------------- scores, limits, origin


def _scores(folder: Path) -> str:
    scores = {name: score for name, score in stage_scores(folder).items() if not name.startswith("held_out/shuffled")}
    if not scores:
        return "None were kept: `callbacks.HeldOut` or `lit-vlm evaluate` write them."
    of_sources = [name for name in scores if name.startswith("held_out/") and name.count("/") == 2]
    if len({name.split("/")[1] for name in of_sources}) == 1:  # its scores are those of all
        scores = {name: score for name, score in scores.items() if name not in of_sources}
    rows: list[tuple[str, ...]] = []
    for name, score in scores.items():
        rows.append(
            (
                f"`{name}`",
                words.number(score.value, score.share),
                _interval(score),
                str(len(score.answers) or "–"),
                "–" if score.chance is None else words.number(score.chance, score.share),
                "–" if score.shuffled is None else words.number(score.shuffled, score.share),
            )
        )
    head = ("score", "value", f"{LEVEL:.0%} interval", "questions", "guessing", "pictures exchanged")
    note = "Shares in percent. Intervals are over questions alone, for this one run: other seeds are not in them."
    return _table(head, rows) + f"\n\n{note}"


def _of_others(rounded: str | None) -> str:
    if rounded is None:
        return ""
    return f"\n\nThey are those of the weights as they were trained; here they are rounded to {rounded}."


def _interval(score: Score) -> str:
    """The interval of a mean over questions: Wilson's where they are right or wrong, else by the t distribution."""
    values = list(score.answers.values())
    if len(values) < 2:
        return "–"
    if set(values) <= {0.0, 1.0}:
        found = stats.binomtest(round(sum(values)), len(values)).proportion_ci(LEVEL, method="wilson")
        low, high = float(found.low), float(found.high)
    else:
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        low, high = fmean(values) - half, fmean(values) + half
    return f"{words.number(low, score.share)} to {words.number(high, score.share)}"


def _limits(last: Stage, bases: Sequence[str]) -> str:
    data = last.config["data"]
    transform = (data.get("transform") or {}).get("class_path", "").rpartition(".")[2]
    points = [
        f"Prompts have {data['max_length']:,} positions at most, pictures included: it was trained on no longer ones.",
        f"Pictures go through `{transform}` first." if transform else "",
        "It answers what its data ask for; nothing here says that answers are true, safe or free of bias.",
        f"Its licence is bound by those of {', '.join(bases)}, and of the data." if bases else "",
    ]
    return "\n".join(f"- {point}" for point in points if point)


def _origin(stages: Sequence[Stage]) -> str:
    origin = {key: value for stage in stages for key, value in stage.tracked.origin.items()}
    commit = origin.get("git.commit")
    versions = {key.removeprefix("version."): value for key, value in origin.items() if key.startswith("version.")}
    lines = [f"- Seed: {stages[-1].config.get('seed_everything')}"]
    if commit:
        lines.append(f"- Commit of the code: `{commit}`")
    if versions:
        lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if not origin:
        lines.append("- Versions and commit: not found; the MLflow store of the run is gone or was not used.")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(Table("", tuple(head), tuple(map(tuple, rows))), numbers=False)
