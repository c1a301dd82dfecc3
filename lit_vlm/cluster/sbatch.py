"""The script of a job of SLURM that starts a run or goes on with it, and puts itself into the queue again."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_vlm.checkpoints.folder import DONE_FILE
from lit_vlm.cluster.queue import ATTEMPTS, START
from lit_vlm.cluster.site import Site
from lit_vlm.core.launcher import LOST, PREEMPTED

SCRIPT = "job.sh"
"""Name of the script in the folder of the run."""
LOGS = "logs"
KEPT = ("PYTHONPATH", "LIT_VLM_CACHE", "LIT_VLM_PLUGINS", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
"""Environment variables of the submission that a run depends on, beside those that SLURM hands on by itself. Secrets
are not among them, as the script is kept."""


@dataclass(frozen=True)
class Job:
    """A job of SLURM.

    Attributes:
        name: its name.
        folder: folder of the run; of an array, the folder in which each run has one.
        command: words behind `lit-vlm` without the folder of the run and the seed.
        nodes: number of machines.
        gpus: GPUs of each, and as many processes; 0 for machines without.
        tasks: processes of each machine.
        site: settings of the cluster.
        seeds: seeds of the runs of an array; none for a single run.
        workers: tasks of an array that share the work in one folder; 0 for none.
        image: image of a container.
        mlflow: URI of the store of MLflow runs, valid in any working folder.
    """

    name: str
    folder: Path
    command: Sequence[str]
    nodes: int
    gpus: int
    tasks: int
    site: Site
    seeds: Sequence[int] = ()
    workers: int = 0
    image: str | None = None
    mlflow: str = ""


def script(job: Job, environment: Mapping[str, str] | None = None) -> str:
    """The text of the script.

    Args:
        job: the job.
        environment: environment variables of the submission; default: those of this process.
    """
    given = os.environ if environment is None else environment
    own = job.folder / SCRIPT
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Written by lit-vlm {'ablate' if job.workers else 'submit'}. It starts the run or goes on, so it "
            "can be submitted again:",
            f"#     sbatch {shlex.quote(str(own.absolute()))}",
            *(f"#SBATCH {option}" for option in _options(job)),
            "",
            f"cd -- {shlex.quote(os.getcwd())} || exit 1",
            f"run={_run_folder(job)}",
            "",
            *_environment(job, given),
            "",
            f"command=({_command(job)})",
            "",
            BODY
            % (
                {
                    "step": _step(job),
                    "stages": "stages/" if job.workers else "",
                    "attempts": ATTEMPTS,
                    "start": START,
                    "done": DONE_FILE,
                }
                | CODES
            ),
        ]
    )


def _options(job: Job) -> list[str]:
    """Options of sbatch; those that the site file adds come last, so that they win."""
    site = job.site
    log = "%A_%a.out" if job.seeds or job.workers else "%j.out"
    values = {
        "job-name": job.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": site.cpus_per_gpu and site.cpus_per_gpu * max(1, job.gpus // job.tasks),
        "mem": site.mem,
        "time": site.time,
        "array": _ranges(job.seeds or range(job.workers)) or None,
        # Without B: the signal goes to the processes of the run, and not to this script.
        "signal": f"USR1@{site.signal_before}",
        "open-mode": "append",
        "output": f"{str((job.folder / LOGS).absolute()).replace('%', '%%')}/{log}",
    }
    options = [f"--{name}={_option(str(value))}" for name, value in values.items() if value is not None]
    return [*options, "--requeue", *site.sbatch]


def _option(value: str) -> str:
    """A value behind `#SBATCH --NAME=`, where sbatch reads double quotes and backslashes as a shell does."""
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _ranges(seeds: Sequence[int]) -> str:
    """Seeds as SLURM writes them: 0-7 where they follow each other, else with commas."""
    if len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _run_folder(job: Job) -> str:
    folder = shlex.quote(str(job.folder))
    return f'{folder}/seed-"$SLURM_ARRAY_TASK_ID"' if job.seeds else folder


def _environment(job: Job, given: Mapping[str, str]) -> list[str]:
    """Lines that set what a run depends on; the site's own come last, so that they win."""
    site = job.site
    lines = [f"export {name}={shlex.quote(given[name])}" for name in KEPT if given.get(name)]
    if job.image is None:  # an image brings its own
        lines.append(f'export PATH={shlex.quote(os.path.join(sys.prefix, "bin"))}:"$PATH"')
    else:
        lines = [line for line in lines if not line.startswith("export PYTHONPATH=")]
    if job.mlflow:
        lines.append(f"export MLFLOW_TRACKING_URI={shlex.quote(job.mlflow)}")
    local = _filled_in(site.local_cache) if site.local_cache else '"${TMPDIR:-/tmp}"'
    lines += [
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        "# What compilers keep: on a disk of each node, as many processes write there at once.",
        f'local={local}/lit-vlm-"$(id -un)"',
        'export TORCHINDUCTOR_CACHE_DIR="$local/inductor" TRITON_CACHE_DIR="$local/triton"',
        *site.prologue,
        *(f"export {name}={_filled_in(value)}" for name, value in site.environment.items()),
    ]
    return lines


def _filled_in(text: str) -> str:
    """A word of the shell in which $NAME is replaced by the variable, and nothing else has a meaning."""
    return '"' + re.sub(r'["\\`]|\$(?![A-Za-z_{])', lambda found: "\\" + found[0], text) + '"'


def _command(job: Job) -> str:
    """The command of each process as words of a bash array."""
    start = ["lit-vlm"] if job.image is not None else [sys.executable, "-P", "-m", "lit_vlm"]
    words = [shlex.join([*start, *job.command]), '--out "$run"']
    if job.seeds:
        words.append('--seed_everything "$SLURM_ARRAY_TASK_ID"')
    return " ".join(words)


def _step(job: Job) -> str:
    """The command that starts the processes of the run."""
    words = ["srun", "--kill-on-bad-exit=1", '${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}']
    if job.image is None:
        return " ".join([*words, '"${command[@]}"'])
    mounts = [os.getcwd(), *job.site.mounts]
    image = shlex.quote(job.image)
    if job.site.container == "pyxis":
        places = _filled_in(",".join(place if ":" in place else f"{place}:{place}" for place in mounts))
        words += [f"--container-image={image}", f"--container-mounts={places}", '--container-workdir="$PWD"']
    else:
        places = _filled_in(",".join(mounts))
        words += ["apptainer", "exec", *(["--nv"] if job.gpus else []), "--bind", places, '--pwd "$PWD"', image]
    return " ".join([*words, '"${command[@]}"'])


CODES = {"preempted": PREEMPTED, "lost": LOST, "killed": 137}
"""Exit codes behind which a run can go on; the last is that of what SIGKILL ended, such as for want of memory."""
BODY = """\
# The newest checkpoint of each stage, and the stages that are done.
reached() {
  local stage newest
  for stage in "$run"/%(stages)s*/; do
    newest=$(ls "$stage/checkpoints" 2>/dev/null | grep -o '^step=[0-9]*' | sort -V | tail -n 1)
    if [ -e "$stage/%(done)s" ]; then newest=done; fi
    if [ -n "$newest" ]; then printf '%%s:%%s ' "$(basename "$stage")" "$newest"; fi
  done
}

# Of an array's tasks one has the number of the whole array, so that is no name for it.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-$SLURM_JOB_ID}"
mkdir -p -- "$run"
attempts="$run/%(attempts)s"
note() { local line; printf -v line '%%s\\t' "$(date -Is)" "$job" "$@"; printf '%%s\\n' "$line" >>"$attempts"; }
before=$(reached)
note %(start)s "$before"
echo "$(date -Is) job $job, started again ${SLURM_RESTART_COUNT:-0} times, on $SLURM_JOB_NODELIST"
%(step)s
code=$?

after=$(reached)
went=on
if [ "$before" = "$after" ]; then went=nowhere; fi
last=$(awk -F '\\t' -v job="$job" '$2 == job && $3 != "%(start)s" { went = $5 } END { print went }' \\
  "$attempts")
note "$code" "$after" "$went"
echo "$(date -Is) job $job ended with exit code $code"

# %(preempted)s: the run saved and left because it was asked to; %(lost)s: a process of it was lost; %(killed)s: one was
# killed. The same command goes on with it.
if [ "$code" -eq %(preempted)s ] || [ "$code" -eq %(lost)s ] || [ "$code" -eq %(killed)s ]; then
  if [ "$went$last" = nowherenowhere ]; then
    echo "error: this job ended twice in a row before it had a new checkpoint, so it is not put into the" \\
      "queue again. Ask for more time (--time), or look above for what takes so long" >&2
  else
    scontrol requeue "$job" || echo "error: not put into the queue again; submit this script once more" >&2
  fi
fi
exit "$code"
"""
