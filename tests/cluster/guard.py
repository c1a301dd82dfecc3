"""Ends a SLURM of `tests.cluster.slurm` when the process that started it ends, however that ends.

`python -m tests.cluster.guard FOLDER` reads its standard input until it is closed, ends all processes that belong to
the cluster in FOLDER, takes its line out of /etc/hosts, and removes FOLDER.
"""

from __future__ import annotations

import fcntl
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

HOSTS = Path("/etc/hosts")


def variables(process: psutil.Process) -> dict[str, str]:
    """The environment that a process was started with; empty for one that has ended.

    psutil reads to the first empty string only, which those that rename themselves, as slurmstepd does, have put there.
    """
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in block.split("\0"))
    return {name: value for name, _, value in pairs}


def members(folder: Path) -> list[psutil.Process]:
    """The processes that were started with the cluster's configuration: its daemons, its jobs, what its jobs start."""
    conf = f"{folder}/slurm.conf"
    return [process for process in psutil.process_iter() if variables(process).get("SLURM_CONF") == conf]


def change_hosts(mark: str, line: str = "") -> None:
    """Replace the lines of /etc/hosts that end in `mark` by one line, or by none. The file may be a mount point."""
    with HOSTS.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        kept = "".join(old for old in file if not old.rstrip().endswith(mark))
        kept += "\n" if line and kept and not kept.endswith("\n") else ""
        file.seek(0)
        file.write(kept + (f"{line} {mark}\n" if line else ""))
        file.truncate()


def end(folder: Path) -> None:
    """End the cluster: daemons of nodes first, so that none reports the deaths of the others."""
    change_hosts(f"# {folder}")
    while left := [process for process in members(folder) if process.pid != psutil.Process().pid]:
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    sys.stdin.read()
    end(Path(sys.argv[1]))
