"""GPUs that do not exist: a library that is loaded in front of CUDA's, so that a step can be planned on any machine.

`device.c` says what is real then and what is not. It is compiled when it is first needed, which takes a second.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from lit_vlm.core.cache import cache_dir
from lit_vlm.planning.job import Device

HERE = Path(__file__).parent
SOURCE = HERE / "device.c"
COMPILERS = ("cc", "gcc", "clang")


class NoSimulation(ValueError):
    """GPUs cannot be simulated on this machine; the message says what is missing."""


def library() -> Path:
    """The compiled library.

    Raises:
        NoSimulation: without Linux, a CUDA build of PyTorch, CUDA's headers or a C compiler; or where it cannot be
            compiled.
    """
    compiler, headers = _needed()
    content = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    target = cache_dir() / f"no_gpu-{hashlib.sha256(content).hexdigest()[:12]}" / "libcuda.so.1"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Compiled aside and moved: a process that is killed here, or one that races, leaves no half library behind.
    handle, scratch = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    options = ["-O1", "-fPIC", "-shared", "-w", "-Wl,-soname,libcuda.so.1"]
    words = [compiler, *options, f"-I{HERE / 'headers'}", f"-I{headers}", "-o", scratch, str(SOURCE), "-lpthread"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(scratch)
        reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        raise NoSimulation(f"{compiler} cannot compile {SOURCE.name}: {reason}")
    os.replace(scratch, target)
    return target


def can_simulate() -> bool:
    """Whether devices can be simulated on this machine."""
    try:
        library()
    except NoSimulation:
        return False
    return True


def _needed() -> tuple[str, Path]:
    """A C compiler, and the folder of CUDA's headers."""
    if sys.platform != "linux":
        raise NoSimulation("simulated GPUs need Linux, whose loader can put a library in front of CUDA's")
    headers = cuda_headers()
    if headers is None:
        raise NoSimulation(
            "simulated GPUs need a CUDA build of PyTorch and the package nvidia-cuda-runtime that it brings along: "
            "pip install torch, without the index of CPU builds"
        )
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NoSimulation(f"simulated GPUs need a C compiler, and none of {', '.join(COMPILERS)} is on the PATH")
    return compiler, headers


def cuda_headers() -> Path | None:
    """The folder of CUDA's headers that came with PyTorch; None without."""
    spec = importlib.util.find_spec("torch")
    site = Path(spec.origin).parent.parent if spec and spec.origin else Path(sysconfig.get_path("purelib"))
    found = sorted(site.glob("nvidia/cu*/include/driver_types.h"))
    return found[-1].parent if found else None


def environment(device: Device, count: int) -> dict[str, str]:
    """Environment variables of a process that shall see simulated devices.

    Args:
        device: the kind of device; PyTorch keeps its properties, but for the memory, once it has asked for them.
        count: number of devices of the node.

    Raises:
        NoSimulation: as `library`.
    """
    major, minor = device.capability
    return {
        "LD_PRELOAD": str(library()),
        "NO_GPU_NAME": device.name,
        "NO_GPU_COUNT": str(count),
        "NO_GPU_MAJOR": str(major),
        "NO_GPU_MINOR": str(minor),
        **memory(device),
    }


def memory(device: Device) -> dict[str, str]:
    """The variable that says how much memory each device has; it is read whenever memory is asked for."""
    return {"NO_GPU_BYTES": str(device.bytes)}


def loaded() -> bool:
    """Whether the devices of this process are simulated."""
    return "NO_GPU_COUNT" in os.environ and "libcuda" in os.environ.get("LD_PRELOAD", "")


def prepare_fork() -> None:
    """Prepare PyTorch for simulated devices, in a fork.

    cuDNN has no simulation, so convolutions and attention take PyTorch's own kernels. And a library that was imported
    before the fork may have started CUDA, which only forbids a fork to use it where it is real.
    """
    import torch

    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda._is_in_bad_fork = lambda: False
    # Beside a real driver PyTorch would ask that one how many there are.
    torch.cuda.device_count = torch._C._cuda_getDeviceCount
