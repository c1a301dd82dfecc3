"""A curation: measure all records, let the steps decide, and write those that stay as a converted set.

Layout of the result, besides the files of a converted set (`lit_vlm.data.sources.converted`):

- `curation.json`: sources, steps with their settings, and counts; it is written last;
- `dropped.parquet`: a row for each record that was left out, with the step, the reason and the value;
- `lists/`: what steps list besides, such as the questions of benchmarks whose pictures were found;
- `sheets/`: for each step a picture of some that it dropped beside some that it kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

import lit_vlm
from lit_vlm.core.cache import held
from lit_vlm.core.written import whole_folder, write_whole
from lit_vlm.data.curation.deciding import READ, Decided, Dropped, decide, spread
from lit_vlm.data.curation.measuring import measured
from lit_vlm.data.curation.selected import Selected
from lit_vlm.data.curation.sheet import draw_sheet
from lit_vlm.data.curation.step import Step, identity
from lit_vlm.data.curation.table import Table
from lit_vlm.data.records.json_files import read_json
from lit_vlm.data.sets.convert import TooManyBad, convert, refuse_inside
from lit_vlm.data.sets.engine import HERE, Engine
from lit_vlm.data.sets.shards import BLOCKS, PLAN, is_used
from lit_vlm.data.sources.base import Source

REPORT = "curation.json"
DROPPED = "dropped.parquet"
SHEETS = "sheets"
LISTS = "lists"
KEPT = "kept.npy"
VERSION = 1


@dataclass(frozen=True)
class Curation:
    """What a curation file says.

    Attributes:
        name: of the set that is made.
        sources: the sources, whose names differ.
        steps: the steps, in order.
        seed: of everything that is drawn.
    """

    name: str
    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    seed: int = 0

    @property
    def key(self) -> str:
        """16 hex digits of all that decides the result."""
        parts = [VERSION, *map(identity, self.sources), *map(identity, self.steps), self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def curate(curation: Curation, out: Path, measures: Path, engine: Engine = HERE) -> dict[str, Any]:
    """Make a set of the records of sources that all steps keep; one that was stopped goes on where it was.

    The result is the same, byte for byte, for any number of workers and tasks.

    Args:
        curation: sources and steps.
        out: folder of the new set.
        measures: folder of what is measured; curations of the same sources share it.
        engine: starts the workers.

    Returns:
        what `curation.json` says.

    Raises:
        ValueError: when `out` holds something else, when it or `measures` lies inside a source, when a step drops
            everything, and as `measured`.
    """
    key = curation.key
    _check_out(curation, out, measures, key)
    if (out / REPORT).is_file():
        return read_json(out / REPORT)
    steps = curation.steps
    table = measured(curation.sources, [m for s in steps for m in s.measures()], measures, engine)
    against = [measured(s.against(), s.measures(), measures, engine) if s.against() else None for s in steps]
    decided = measures / f"decided-{key}"
    with held(measures / f"decided-{key}.lease", "decides what is kept"):
        if not decided.is_dir():
            with whole_folder(decided) as scratch:
                _decide(curation, table, against, scratch)
    source = Selected(curation.sources, np.load(decided / KEPT), curation.name)
    try:
        info = convert(source, out, engine, max_bad_share=0.0)
    except TooManyBad as error:
        raise ValueError(
            f"records that were measured cannot be read any more, see {out / 'bad_samples.jsonl'}: bring them back, or "
            f"remove {measures} and {out} and begin anew"
        ) from error
    with held(measures / f"decided-{key}.lease", "writes the report"):
        if not (out / REPORT).is_file():
            for name in (SHEETS, LISTS):
                shutil.copytree(decided / name, out / name, dirs_exist_ok=True)
            write_whole(out / DROPPED, lambda file: shutil.copyfile(decided / DROPPED, file))
            report = {**read_json(decided / REPORT), "set": {"records": info.records, "fingerprint": info.fingerprint}}
            write_whole(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return read_json(out / REPORT)


def _check_out(curation: Curation, out: Path, measures: Path, key: str) -> None:
    refuse_inside(out, *curation.sources)
    refuse_inside(measures, *curation.sources)
    if measures.resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"--measures {measures} lies in {out}, which is to hold the new set alone: name another folder"
        )
    if (out / REPORT).is_file():
        if read_json(out / REPORT).get("key") != key:
            raise ValueError(
                f"{out} holds the result of another curation: remove it, or name another folder (with --measures, "
                "nothing is measured again)"
            )
    elif is_used(out) and not any((out / p).exists() for p in (PLAN, f"{BLOCKS}/{PLAN}")):
        raise ValueError(f"{out} is not empty: remove it, or name another folder")


def _decide(curation: Curation, table: Table, against: Sequence[Table | None], folder: Path) -> None:
    """Write what is kept, what is dropped and why, the sheets and the report."""
    (folder / SHEETS).mkdir()
    (folder / LISTS).mkdir()
    dropped, rows = Dropped(table), []
    if not len(table.readable):
        raise ValueError(
            f"none of the {len(table):,} records of {', '.join(table.names)} can be read: {_unread(table)}"
        )
    kept = table.readable
    for number, decided in enumerate(decide(curation.steps, table, against, curation.seed), start=1):
        dropped.add(decided)
        file = folder / SHEETS / f"{decided.name.replace(' ', '-')}.png"
        draw_sheet(decided, curation.sources, file, np.random.default_rng([curation.seed, number]))
        _write_lists(decided, folder / LISTS)
        rows.append(_row(decided, curation.steps[number - 1], table))
        kept = decided.kept
    dropped.write(folder / DROPPED)
    np.save(folder / KEPT, kept)
    report = {
        "version": VERSION,
        "kit": lit_vlm.__version__,
        "key": curation.key,
        "seed": curation.seed,
        "sources": {
            source.name: {**json.loads(identity(source)), "records": len(source), "kept": int(count)}
            for source, count in zip(
                curation.sources, np.bincount(table.source[kept], minlength=len(table.names)), strict=True
            )
        },
        "records": len(table),
        "kept": len(kept),
        READ: {"in": len(table), "dropped": _unread(table), "kept": len(table.readable)},
        "steps": rows,
    }
    write_whole(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _write_lists(decided: Decided, folder: Path) -> None:
    for name, entries in decided.verdict.lists.items():
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        write_whole(folder / f"{decided.name.replace(' ', '-')}-{name}.jsonl", "".join(lines))


def _row(decided: Decided, step: Step, table: Table) -> dict[str, Any]:
    of = table.source[decided.candidates]
    return {
        "step": decided.name,
        "settings": json.loads(identity(step)),
        **decided.counts(),
        "by_source": {name: decided.counts(of == number) for number, name in enumerate(table.names)},
        "values": {"label": decided.verdict.label, **spread(decided.verdict)},
    }


def _unread(table: Table) -> dict[str, int]:
    """Reason → number of records that cannot be read, the most frequent first."""
    found: Counter[str] = Counter()
    for _, rows in table.rows():
        found.update({entry["values"]: entry["counts"] for entry in pc.value_counts(rows["reason"]).to_pylist()})
    found.pop("", None)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
