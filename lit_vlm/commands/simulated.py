"""The process in which `lit-vlm plan` runs steps: libraries are loaded once, each step runs in a fork."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from lit_vlm.commands.fit import lightning_cli, quietly, take_plugins
from lit_vlm.core.plugins import load_plugins
from lit_vlm.planning import no_gpu
from lit_vlm.planning.job import Failed, Job, Measured
from lit_vlm.planning.published import shipped
from lit_vlm.planning.simulation import serve, serve_one


def run(job: Job) -> Measured | Failed:
    """Run a job on the devices of this process, simulated or real."""
    from lit_vlm.planning.step import run_job

    if no_gpu.loaded():
        os.environ.update(no_gpu.memory(job.device))
        no_gpu.prepare_fork()
    with shipped(), quietly():
        return run_job(job, Commands())


class Commands:
    """How a stage's objects come from the arguments of `lit-vlm fit`."""

    def make(self, words: Sequence[str]) -> Any:
        """A LightningCLI with its objects built; raises ValueError as `lightning_cli`."""
        return lightning_cli(words, run=False)

    def parse(self, words: Sequence[str]) -> Any:
        """The config alone; raises ValueError for a wrong flag."""
        from lit_vlm.commands.lightning_cli import ParsedCLI

        arguments = take_plugins(list(words))
        load_plugins()
        return ParsedCLI(arguments).config


def main() -> None:
    """Load the libraries, then serve jobs until the standard input ends, or with the argument `one` a single one."""
    import lit_vlm.commands.lightning_cli
    import lit_vlm.planning.step  # noqa: F401

    if sys.argv[1:] == ["one"]:
        serve_one(run)
    else:
        serve(run)


if __name__ == "__main__":
    main()
