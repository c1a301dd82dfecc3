"""A process of torchrun: in the first attempt one is lost, in the second rank 0 comes late."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from lit_vlm.core.launcher import launch
from lit_vlm.training.launched import environment

if __name__ == "__main__":
    started = launch()
    environment(started)
    if started.attempt and started.is_first:
        time.sleep(3)
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    if not started.attempt:
        if not started.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # until it is ended
    dist.destroy_process_group()
    print(f"rank {started.rank}: {total.item():g}", flush=True)  # noqa: T201 - what the test reads
