"""`lit-vlm data view`: a local page to look at records."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from lit_vlm.commands.fit import lightning_cli, unlaunched
from lit_vlm.core.launcher import launch
from lit_vlm.data.feed.names import tell_apart
from lit_vlm.data.given import open_as
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sets.forms import FORMS
from lit_vlm.data.view.left_out import LeftOuts, beside
from lit_vlm.data.view.measures import read_measures
from lit_vlm.data.view.records import Records
from lit_vlm.data.view.server import HOST, Viewer, make_server
from lit_vlm.model.build import build_on_meta


def add(verbs: Any) -> None:
    """Add the verb and its arguments to those of `lit-vlm data`."""
    parser = verbs.add_parser(
        "view",
        help="a local page to look at records",
        description="Serve a page, on this machine alone, that shows records: pictures, messages with what is "
        "supervised marked, what was left out and why, search, and filters by length, pictures and what lit-vlm data "
        "curate measured. Nothing is changed. Ctrl-C ends.",
        epilog="With the flags of lit-vlm fit (--config FILE ...) records are also shown as that model gets them: "
        f"template, labels, positions, resized pictures. Forms: {', '.join(FORMS)}.",
    )
    parser.add_argument(
        "sets", metavar="SET", nargs="+", help="a converted set, or any file or folder of the forms below"
    )
    parser.add_argument("--form", help="how to read SET, if not as recognised; see lit-vlm data convert")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an argument of the form's class"
    )
    parser.add_argument(
        "--left-out", action="append", default=[], type=Path, metavar="FILE",
        help="a bad_samples.jsonl of a run, or a dropped.parquet, besides those in SET",
    )  # fmt: skip
    parser.add_argument(
        "--measures", type=Path, help="folder of what lit-vlm data curate measured (default: SET.measures, if there)"
    )
    parser.add_argument("--port", type=int, default=8765, help="0, or from 1024 to 65535; 0 takes a free one (8765)")


def run(arguments: argparse.Namespace, config: Sequence[str]) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    if not launch().is_first:
        return
    sources = [open_as(path, arguments.form, arguments.set) for path in arguments.sets]
    tell_apart(sources)
    listed = [*(file for path in arguments.sets for file in beside(path)), *arguments.left_out]
    measures = arguments.measures or _measures_of(arguments.sets[0])
    encode, model = _model(config) if config else (None, "")
    records = Records(sources, encode, read_measures(measures) if measures else None)
    server = make_server(Viewer(records, LeftOuts(listed), model), arguments.port)
    Console(highlight=False).print(
        f"{len(records):,} records of {', '.join(source.name for source in sources)}: open "
        f"http://{HOST}:{server.server_port}/ ; Ctrl-C ends",
        soft_wrap=True,
    )
    signal.signal(signal.SIGTERM, _end)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def _measures_of(path: str) -> Path | None:
    """The folder in which `lit-vlm data curate` keeps what it measured for a set, if it is there."""
    folder = Path(f"{path.rstrip('/')}.measures")
    return folder if folder.is_dir() else None


def _model(config: Sequence[str]) -> tuple[SampleEncoder, str]:
    """The encoder of samples of a config, and what it is called on the page."""
    cli = lightning_cli([*config, "--trainer.logger", "false", *unlaunched()], run=False)
    cli.model.model = build_on_meta(cli.model.slots)
    encode = cli.datamodule.sample_encoder(cli.model.input_spec)
    parts = (type(encode.template).__name__, type(encode.transform).__name__, f"at most {encode.max_length} positions")
    return encode, ", ".join(parts)


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
