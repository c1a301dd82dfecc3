"""Choice of the number format of matrix products: the one that the device is fast in, by a query or a measurement.

bf16 products are two to four times as fast as fp32 on processors with AMX or AVX512-BF16 and on recent GPUs, and a
hundred times slower on processors that have to emulate them, so no recipe can name one format for all machines.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from lit_vlm.core.launcher import launch

AUTO: Literal["auto"] = "auto"
CHOSEN = "LIT_VLM_PRECISION"
"""Environment variable: what the first process chose, as DEVICE:NAME, for the processes that it starts."""
SIDE, SECONDS = 256, 0.012
"""Side of the matrices that are multiplied, and seconds per format; one product in emulated bf16 takes 40 ms."""
GAIN = 1.2
"""bf16 must be faster than fp32 by this factor, as casting takes time, too."""

SCALED = "16-mixed"
"""fp16 with gradients that are scaled up, so that small ones are not lost; a step that overflows is left out."""
Name = Literal["bf16-mixed", "16-mixed", "32-true"]
DTYPES: dict[str, torch.dtype] = {
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
    "32-true": torch.float32,
}


@dataclass(frozen=True)
class Precision:
    """A number format.

    Attributes:
        name: as `trainer.precision` takes it.
        why: how it was chosen, for a line in the terminal.
    """

    name: Name
    why: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of the operands of matrix products, and of the weights where nothing trains."""
        return DTYPES[self.name]

    def autocast(self, device_type: str) -> AbstractContextManager[object]:
        """Run matrix products in this format while weights stay in fp32."""
        return autocast(self.name, device_type)


def autocast(name: str, device_type: str) -> AbstractContextManager[object]:
    """What Lightning does around a forward pass for a `trainer.precision`; nothing where all is in one type."""
    dtype = DTYPES.get(name, torch.float32)
    return torch.autocast(device_type, dtype) if dtype != torch.float32 else nullcontext()


def choose(device_type: str, scaled: bool = True, index: int | None = None) -> Precision:
    """The format that a device is fast in.

    Args:
        device_type: `cpu`, `cuda` or another one of torch's.
        scaled: whether fp16 with scaled gradients may be used on cards without bf16: True for training that is not
            sharded, False for inference, as weights that were trained in bf16 may overflow in fp16.
        index: number of the card; default: the card of this process.
    """
    if device_type == "cuda":
        return _of_card(scaled, int(os.environ.get("LOCAL_RANK", launch().local_rank)) if index is None else index)
    if device_type == "cpu":
        return _of_processor()
    return Precision("32-true", f"nothing else is tried on {device_type}")


def _of_card(scaled: bool, index: int) -> Precision:
    index %= max(1, torch.cuda.device_count())  # a process may see its own card alone
    card = torch.cuda.get_device_name(index)
    if torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip is not None:
        return Precision("bf16-mixed", f"{card} has bf16")
    if scaled:
        return Precision("16-mixed", f"{card} has no bf16; gradients are scaled")
    return Precision("32-true", f"{card} has no bf16, and gradients are not scaled for fp16 here")


def _of_processor() -> Precision:
    device, _, inherited = os.environ.get(CHOSEN, "").partition(":")
    if device == "cpu" and inherited in DTYPES:
        return Precision(inherited, "chosen before, by a measurement")  # type: ignore[arg-type]
    if emulates_bf16(torch.device("cpu")):
        return Precision("32-true", "this processor has no instructions for bf16")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or launch().world_size > 1:
        return Precision("32-true", "several processes on CPUs do not measure beside each other")
    low, full = matmul_speed(torch.bfloat16), matmul_speed(torch.float32)
    name: Name = "bf16-mixed" if low > GAIN * full else "32-true"
    os.environ[CHOSEN] = f"cpu:{name}"
    return Precision(name, f"one thread multiplies matrices at {_rate(low)} in bf16, at {_rate(full)} in fp32")


def emulates_bf16(device: torch.device) -> bool:
    """Whether a device is a processor without instructions for bf16: products take it 30 times as long as in fp32."""
    return device.type == "cpu" and not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def matmul_speed(dtype: torch.dtype) -> float:
    """FLOP/s of one thread in square matrix products: the best of the products that fit into 12 ms, at least one.

    One thread, because several wait for each other where other work runs, and measure that.
    """
    left, right = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    threads, best, end = torch.get_num_threads(), float("inf"), 0.0
    torch.set_num_threads(1)
    try:
        left @ right  # which also prepares the kernel
        while not end or time.perf_counter() < end:
            start = time.perf_counter()
            left @ right
            now = time.perf_counter()
            best, end = min(best, now - start), end or now + SECONDS
    finally:
        torch.set_num_threads(threads)
    return 2.0 * SIDE**3 / best


def _rate(flops: float) -> str:
    return f"{flops / 1e9:,.0f} GFLOP/s" if flops >= 1e9 else f"{flops / 1e9:.1f} GFLOP/s"


def crowded() -> str | None:
    """A warning if more threads want to run than the machine has cores; None if all is well, or it cannot be known."""
    cores = os.cpu_count()
    if cores is None or not hasattr(os, "getloadavg") or (load := os.getloadavg()[0]) <= cores + 0.5:
        return None
    advice = "stop other work" if torch.get_num_threads() == 1 else "stop other work, or set OMP_NUM_THREADS=1"
    return (
        f"the load is {load:.1f} on {cores} cores: threads that wait for each other can make work on the CPU ten "
        f"times slower; {advice}"
    )
