"""Simulated devices: what they need, and what they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_vlm.commands.plan import WORKER, simulator
from lit_vlm.planning import no_gpu
from lit_vlm.planning.job import Device, Measured
from lit_vlm.planning.simulation import Rehearsal
from tests.planning.simulated import PLENTY, job, needs_simulation, setup

DEVICE = Device("A100 of this test", 7 * 2**30, (8, 0))


def _seen(code: str) -> str:
    variables = no_gpu.environment(DEVICE, 4)
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@needs_simulation
def test_pytorch_sees_devices_and_their_memory() -> None:
    seen = _seen(
        "import torch; p = torch.cuda.get_device_properties(0);"
        "print(torch.cuda.device_count(), p.name, p.total_memory >> 30, p.major, p.minor)"
    )
    assert seen == "4 A100 of this test 7 8 0"


@needs_simulation
def test_the_allocator_is_pytorch_s_own() -> None:
    seen = _seen(
        "import torch\n"
        "x = torch.empty(3 << 30, dtype=torch.uint8, device='cuda'); del x\n"
        "print(torch.cuda.max_memory_allocated() >> 30, torch.cuda.memory_reserved() >> 30)\n"
        "try:\n    torch.empty(8 << 30, dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError:\n    print('out of memory')"
    )
    assert seen == "3 3\nout of memory"


@needs_simulation
def test_pinned_memory_is_known_and_waits_are_seen() -> None:
    seen = _seen(
        "import torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "x = torch.ones(4).pin_memory()\n"
        "warnings.simplefilter('ignore'); torch.cuda.set_sync_debug_mode('warn'); warnings.simplefilter('error')\n"
        "y = x.to('cuda', non_blocking=True)\n"
        "try:\n    y.sum().item()\n"
        "except UserWarning as said:\n    print(x.is_pinned(), 'synchronizing' in str(said))"
    )
    assert seen == "True True"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(no_gpu.NoSimulation, match="need a C compiler, and none of cc, gcc, clang is on the PATH"):
        no_gpu.library()
    assert not no_gpu.can_simulate()


def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_gpu, "cuda_headers", lambda: None)
    with pytest.raises(no_gpu.NoSimulation, match="need a CUDA build of PyTorch and the package nvidia-cuda-runtime"):
        no_gpu.library()


@needs_simulation
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(no_gpu, "cache_dir", lambda: tmp_path / "cache")
    with pytest.raises(no_gpu.NoSimulation, match="cannot compile device.c: no space left"):
        no_gpu.library()
    assert not list((tmp_path / "cache").rglob("*.so*"))


@pytest.mark.slow
@needs_simulation
def test_a_rehearsal_is_the_first_of_many_on_one_device() -> None:
    variables = no_gpu.environment(Device(setup(1).card.name, PLENTY), 1)
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with simulator(setup(16)) as simulated:
        rehearsal = Rehearsal((*WORKER, "one"), variables, simulated)
        asked = job("hovle", "1_distill", 16, "hsdp")
        alone = rehearsal.run(asked)
        assert alone == simulated.run(asked)
    assert isinstance(alone, Measured)
    assert alone.blocks


@pytest.mark.slow
@needs_simulation
def test_devices_that_are_hidden_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with simulator(setup(8)) as simulated:
        assert isinstance(simulated.run(job("hovle", "1_distill", 8, "fsdp")), Measured)
