"""The process in which `lit-vlm bench` measures one stage; launchers start it again for each further device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_vlm.commands.fit import in_one_line, quietly
from lit_vlm.commands.simulated import Commands
from lit_vlm.planning import no_gpu
from lit_vlm.planning.published import shipped


def main(argv: Sequence[str]) -> None:
    """Measure the stage of a file.

    Args:
        argv: a file with a `BenchJob`, and the file for the result.
    """
    from lit_vlm.planning.bench.job import BenchJob
    from lit_vlm.planning.bench.reference import run_reference
    from lit_vlm.planning.bench.run import run_bench

    job, out = BenchJob.read(Path(argv[0])), Path(argv[1])

    if no_gpu.loaded():
        no_gpu.prepare_fork()  # no fork; the rest of it is needed all the same
    with in_one_line(), shipped(), quietly():
        if job.against:
            run_reference(job, Commands()).write(out)
        elif (result := run_bench(job, Commands())) is not None:
            result.write(out)


if __name__ == "__main__":
    main(sys.argv[1:])
