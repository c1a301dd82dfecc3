"""What one process finds out about itself and its machine, as plain data that `judge` compares."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

import lit_vlm
from lit_vlm.core.cache import cache_dir
from lit_vlm.core.devices import cores
from lit_vlm.core.precision import choose
from lit_vlm.core.versions import installed

PACKAGES = ("torch", "torchvision", "lightning", "transformers", "timm", "peft", "jsonargparse", "litdata", "mlflow",
            "safetensors", "numpy")  # fmt: skip
"""Whose versions decide what a run computes or how its parts talk to each other."""
SOURCES, SUFFIXES = ("lit_vlm", "callbacks", "recipes"), (".py", ".yaml")
VARIABLES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "MASTER_", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
"""Beginnings of names of environment variables that should be alike everywhere."""
ENDS = 64 * 1024
"""Bytes at both ends of a file that are compared."""
TRIAL = 2**20
"""Bytes that are written to find out whether a folder takes them."""
SIDE = {"cpu": 512, "cuda": 8192}
WINDOWS, SECONDS = 3, 0.1
"""Measurements of matrix products, and seconds of each."""


class Place(BaseModel, frozen=True):
    """A process and where it runs.

    Attributes:
        rank: its number.
        node: name or number of its machine, as the launcher has it.
        host: name of the machine, as it calls itself.
    """

    rank: int
    node: str
    host: str


class Device(BaseModel, frozen=True):
    """What a process computes on.

    Attributes:
        kind: `cuda` or `cpu`.
        name: of the card; of the processor's architecture.
        id: of the card, unlike all others; empty for a processor.
        used: bytes of its memory that were taken before this process came.
    """

    kind: str
    name: str
    id: str = ""
    used: int = 0


class Facts(BaseModel, frozen=True):
    """What a process knows of itself.

    Attributes:
        versions: package or part of the system → version.
        sources: file of the kit → digest.
        device: that the process computes on.
        cpus: numbers of the processors that it may run on.
        variables: of the environment, those that should be alike.
        interfaces: names of the machine's network interfaces.
        address: what its own name stands for; empty if for nothing.
        open_files: how many it may have open; -1 for no limit.
        locked: bytes of memory that it may keep from being moved, which InfiniBand needs; -1 for no limit.
        infiniband: whether the machine has such a card.
    """

    versions: dict[str, str]
    sources: dict[str, str]
    device: Device
    cpus: list[int]
    variables: dict[str, str]
    interfaces: list[str]
    address: str
    open_files: int
    locked: int
    infiniband: bool


class Folder(BaseModel, frozen=True):
    """A folder as one machine sees it.

    Attributes:
        path: where it is.
        free: bytes that may be written, as far as the file system says.
        problem: why nothing can be written; None where it can.
    """

    path: str
    free: int
    problem: str | None


class Machine(BaseModel, frozen=True):
    """What one process per machine finds out for all of them.

    Attributes:
        data: path → what is there.
        folders: what each is for → the folder.
        shared_memory: bytes free in /dev/shm; None where there is none.
    """

    data: dict[str, str] = {}
    folders: dict[str, Folder] = {}
    shared_memory: int | None = None


def facts(local_rank: int) -> Facts:
    """Facts of this process.

    Args:
        local_rank: its number on its machine, which says which card is its own.
    """
    return Facts(
        versions=_versions(),
        sources=_sources(),
        device=_device(local_rank),
        cpus=cores(),
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        interfaces=[name for _, name in socket.if_nameindex()],
        address=_own_address(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
    )


def machine(data: Sequence[str], out: Path | None) -> Machine:
    """What is found on this machine.

    Args:
        data: paths that training will read.
        out: existing folder that training will write to; None to leave it out.
    """
    folders = {} if out is None else {"--out": folder(out)}
    try:
        folders["cache"] = folder(cache_dir())
    except OSError as error:  # it cannot be made
        folders["cache"] = Folder(path=str(error.filename or "cache"), free=0, problem=error.strerror or str(error))
    shared = Path("/dev/shm")
    return Machine(
        data={path: glimpse(Path(path)) for path in data},
        folders=folders,
        shared_memory=shutil.disk_usage(shared).free if shared.is_dir() else None,
    )


def glimpse(path: Path) -> str:
    """What is at a path, in words that are alike where the same is: sizes, and a digest of names or of both ends."""
    try:
        if path.is_dir():
            names = sorted(os.listdir(path))
            return f"a folder of {len(names):,} entries ({_digest(chr(0).join(names).encode())})"
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(ENDS)
            file.seek(max(0, size - ENDS))
            content += file.read(ENDS)
        return f"a file of {size:,} bytes ({_digest(content)})"
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        return f"something that cannot be read ({error.strerror})"


def folder(path: Path) -> Folder:
    """Whether a folder takes a file, tried with one of 1 MiB that is removed again."""
    free, problem = 0, None
    try:
        free = shutil.disk_usage(path).free
        with tempfile.NamedTemporaryFile(dir=path, prefix=".lit-vlm-doctor-") as file:
            file.write(bytes(TRIAL))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = error.strerror or str(error)
    return Folder(path=str(path), free=free, problem=problem)


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    whole = path.absolute()
    return next(above for above in (whole, *whole.parents) if above.is_dir())


def seen_after(path: Path, limit: float) -> float | None:
    """Seconds until another machine's file is seen here; None where it is not within `limit` seconds."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > limit:
            return None
        time.sleep(0.05)
    return time.monotonic() - start


def device_of(local_rank: int) -> torch.device:
    """The card of this process, or the processor where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # a process may see its own card alone


def matmul_rate(device: torch.device) -> float:
    """FLOP/s in square matrix products: fp32 on a processor, on cards the format that training takes there.

    The best of three windows of 0.1 s, all of which a device that is slow for good is slow in.
    """
    side = SIDE[device.type]
    dtype = choose("cuda", index=device.index).dtype if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for window in range(WINDOWS + 1):  # the first one prepares kernels and clocks
        count, start = 0, time.perf_counter()
        while not count or (time.perf_counter() - start < SECONDS and window):
            left @ right
            count += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        if window:
            best = max(best, 2.0 * side**3 * count / (time.perf_counter() - start))
    return best


def step_nodes() -> list[str]:
    """Names of the machines of this step of SLURM, in its order; empty elsewhere, or where `scontrol` is not there."""
    nodes, program = os.environ.get("SLURM_STEP_NODELIST"), shutil.which("scontrol")
    if nodes is None or program is None:
        return []
    try:
        asked = subprocess.run([program, "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return asked.stdout.split()


def _versions() -> dict[str, str]:
    found = {"lit-vlm": lit_vlm.__version__, "Python": platform.python_version()}
    found |= dict.fromkeys(PACKAGES, "missing") | installed(PACKAGES)
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
        if torch.distributed.is_nccl_available():
            found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/sys/module/nvidia/version")
    if driver.is_file():
        found["driver"] = driver.read_text().strip()
    return found


def _sources() -> dict[str, str]:
    found = {}
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for file in sorted(Path(root).rglob("*")):
                if file.suffix in SUFFIXES:
                    found[f"{package}/{file.relative_to(root)}"] = _digest(file.read_bytes())
    return found


def _device(local_rank: int) -> Device:
    device = device_of(local_rank)
    if device.type == "cpu":
        return Device(kind="cpu", name=platform.machine())
    free, total = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    return Device(kind="cuda", name=properties.name, id=str(getattr(properties, "uuid", "")), used=total - free)


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
