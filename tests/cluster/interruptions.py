"""Random interruptions of runs on the SLURM of this machine: `python -m tests.cluster.interruptions --seconds 1800`.

Each run is interrupted several times at random moments in random ways, put back or started again by the same command,
and compared with a run that nothing happened to. The table of build/interruptions.json is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from mlflow import MlflowClient

from lit_vlm.checkpoints.folder import is_done
from lit_vlm.checkpoints.weights import read_state
from tests.cluster.slurm import OVER, Slurm, hindrance
from tests.tiny import ROOT

FILE = ROOT / "build" / "interruptions.json"
LAYOUTS = {"1 task": (1, "single"), "2-node ddp": (2, "ddp"), "2-node fsdp": (2, "fsdp")}
"""Name → nodes with a task each, and the strategy."""
BATCHING = {"padded": "--data.batching Padded", "packed": "--data.batching Packed --data.max_length 256"}
KINDS = ("USR1", "TERM", "USR1 of a rank", "KILL of a rank", "KILL of the parent", "KILL of a node", "preemption",
         "scancel", "requeue")  # fmt: skip
"""How a run is interrupted: signals go to all tasks of the step, if not said otherwise; preemption is that of a
partition, whose SIGTERM comes ten seconds before the end."""
STEPS = 60
ATTEMPTS = 4
"""Times that a job which has not come to its end is submitted again after its last interruption."""
WAIT = 240.0


@dataclass
class Case:
    """A run with its interruptions.

    Attributes:
        seed: of kinds and moments.
        layout: a key of `LAYOUTS`.
        workers: loader processes.
        batching: a key of `BATCHING`.
        interruptions: (kind, seconds behind the job's start, newest step of before) of each that took place.
        outcome: `same`, or what is wrong.
        seconds: of the whole case.
    """

    seed: int
    layout: str
    workers: int
    batching: str
    interruptions: list[tuple[str, float, str]] = field(default_factory=list)
    outcome: str = ""
    seconds: float = 0.0


def script(case: Case, out: str, words: str = "", pause: float = 0.25) -> str:
    """A job script as users have one: it starts the run, or goes on, and puts itself back when the run says 75.

    Args:
        case: what is trained.
        out: folder of the run.
        words: more arguments of the run.
        pause: seconds that each step sleeps.
    """
    nodes, strategy = LAYOUTS[case.layout]
    where = "" if nodes == 1 else f"--trainer.devices 1 --trainer.num_nodes {nodes}"
    return (
        f"srun -K1 python -m lit_vlm run llava15 --scale tiny --strategy {strategy} --stages 2_sft --out {out} {where} "
        "--trainer.accelerator cpu --trainer.precision 32-true --trainer.max_epochs -1 "
        f"--trainer.max_steps {STEPS} --trainer.limit_val_batches 0 --trainer.enable_progress_bar false "
        f"--checkpoint.every_n_steps 7 --data.batch_size {4 // nodes} --data.num_workers {case.workers} "
        f"{BATCHING[case.batching]} --trainer.callbacks+=tests.cluster.pause.Pause --trainer.callbacks.seconds {pause} "
        f"{words}\n"
        "code=$?; echo $(date +%T) srun ended with $code\n"
        "case $code in 75|69|137) scontrol requeue $SLURM_JOB_ID; sleep 60;; esac\nexit $code"
    )


class Driver:
    """Runs cases on a cluster.

    Args:
        slurm: the cluster.
        folder: of all runs.
        longest: seconds behind a job's start in which it is interrupted: about as long as an undisturbed run takes.
    """

    def __init__(self, slurm: Slurm, folder: Path, longest: float = 30.0) -> None:
        self.slurm, self.folder, self.longest = slurm, folder, longest
        self._whole: dict[tuple[str, str], dict[str, torch.Tensor]] = {}

    def reference(self, layout: str, batching: str) -> dict[str, torch.Tensor]:
        """Weights of a run that nothing happened to."""
        key = (layout, batching)
        if key not in self._whole:
            case = Case(0, layout, 0, batching)
            name = f"whole-{layout}-{batching}".replace(" ", "_")
            if not is_done(self.folder / name / "2_sft"):  # in a folder that was kept
                job = self._submit(case, name)
                assert self.slurm.wait(job, seconds=WAIT) == "COMPLETED", self.slurm.report(job)
            self._whole[key] = read_state(self.folder / name / "2_sft")
        return self._whole[key]

    def run(self, case: Case, kinds: Sequence[str]) -> None:
        """Run a case: interrupt, let it go on, compare."""
        start, chance = time.monotonic(), random.Random(case.seed)
        whole = self.reference(case.layout, case.batching)
        name = f"run-{case.seed}"
        job = self._submit(case, name)
        try:
            for kind in kinds:
                job = self._interrupt(case, name, job, kind, chance)
            job = self._to_the_end(case, name, job)
            case.outcome = self.judge(name, job, whole)
        except (TimeoutError, AssertionError) as error:
            case.outcome = f"failed: {str(error).splitlines()[0][:200]}"
            (self.folder / f"{name}.txt").write_text(self.slurm.report(job))
            self.slurm.run("scancel", str(job), check=False)
        case.seconds = time.monotonic() - start

    def _submit(self, case: Case, name: str) -> int:
        nodes = LAYOUTS[case.layout][0]
        return self.slurm.submit(
            self.folder, script(case, name), f"--nodes={nodes}", "--ntasks-per-node=1", "--partition=low",
            variables={"MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/{name}.db"},
        )  # fmt: skip

    def _interrupt(self, case: Case, name: str, job: int, kind: str, chance: random.Random) -> int:
        """Interrupt a job that runs, at a random moment; returns the job that goes on, perhaps another."""
        job = self._running(case, name, job)
        moment = chance.uniform(2.0, self.longest)
        restarts = self.slurm.restarts(job)
        time.sleep(moment)
        done = is_done(self.folder / name / "2_sft")
        if done or self.slurm.state(job) != "RUNNING":
            return job  # it came too late
        found = sorted((self.folder / name / "2_sft" / "checkpoints").glob("*.ckpt"))
        if not self._strike(job, kind, chance):
            return job
        case.interruptions.append((kind, round(moment, 1), found[-1].stem if found else "none"))
        end = time.monotonic() + WAIT
        while self.slurm.state(job) == "RUNNING" and self.slurm.restarts(job) == restarts:
            if is_done(self.folder / name / "2_sft"):
                break
            if time.monotonic() > end:
                raise TimeoutError(f"hang: the job still runs {WAIT:.0f} s after {kind}")
            time.sleep(0.3)
        return job

    def _strike(self, job: int, kind: str, chance: random.Random) -> bool:
        """Interrupt; whether there was something to interrupt."""
        slurm, parent, child = self.slurm, "lit_vlm run", "lit_vlm fit"
        ranks = len({one for one in (0, 1) if slurm.processes(job, one)})
        rank = chance.randrange(max(1, ranks))
        match kind:
            case "USR1" | "TERM":
                slurm.run("scancel", f"--signal={kind}", str(job), check=False)
            case "USR1 of a rank" | "KILL of a rank" | "KILL of the parent":
                words = parent if kind.endswith("parent") or not slurm.processes(job, rank, child) else child
                number = signal.SIGUSR1 if kind.startswith("USR1") else signal.SIGKILL
                if not slurm.processes(job, rank, words):
                    return False
                slurm.signal_rank(job, rank, number, words)
            case "KILL of a node":
                name = slurm.show(job)["BatchHost"]
                slurm.kill_node(name)
                slurm.start_node(name)
            case "preemption":
                urgent = slurm.submit(self.folder, "sleep 1", "--partition=high", f"--nodes={len(slurm.names)}",
                                      "--exclusive")  # fmt: skip
                slurm.wait(urgent, seconds=WAIT)
            case "scancel":
                slurm.run("scancel", str(job))
            case "requeue":
                slurm.run("scontrol", "requeue", str(job), check=False)
        return True

    def _running(self, case: Case, name: str, job: int) -> int:
        """A job of the run that runs: this one, once it is put back, or another where it has ended."""
        end = time.monotonic() + WAIT
        while (state := self.slurm.state(job)) != "RUNNING":
            if state in OVER:
                if is_done(self.folder / name / "2_sft"):
                    return job
                job = self._submit(case, name)
            if time.monotonic() > end:
                raise TimeoutError(f"the job stays {state}")
            time.sleep(0.3)
        return job

    def _to_the_end(self, case: Case, name: str, job: int) -> int:
        for _ in range(ATTEMPTS):
            state = self.slurm.wait(job, seconds=WAIT)
            if state == "COMPLETED":
                return job
            job = self._submit(case, name)
        raise AssertionError(f"not at its end after {ATTEMPTS} more attempts")

    def judge(self, name: str, job: int, whole: dict[str, torch.Tensor]) -> str:
        """`same`, or what is not as in the run that nothing happened to."""
        wrong = []
        found = read_state(self.folder / name / "2_sft")
        differ = [key for key, value in whole.items() if not torch.equal(found[key], value)]
        if differ or found.keys() != whole.keys():
            wrong.append(f"{len(differ)} of {len(whole)} tensors differ")
        client = MlflowClient(f"sqlite:///{self.folder}/{name}.db")
        experiments = [one.experiment_id for one in client.search_experiments()]
        told = Counter(run.info.status for run in client.search_runs(experiments))
        if told != {"FINISHED": 2}:
            wrong.append(f"MLflow tells {dict(told)}")
        if left := self.slurm.processes(job):
            wrong.append(f"{len(left)} processes are left")
        return "; ".join(wrong) or "same"


def cases(seed: int) -> list[tuple[Case, list[str]]]:
    """Cases without end are made of rounds: each has every layout, and in turn every kind, workers and batching."""
    chance = random.Random(seed)
    made = []
    for number in range(1000):
        layout = list(LAYOUTS)[number % 3]
        kinds = chance.sample(KINDS, 3)
        case = Case(1000 * seed + number, layout, chance.choice((0, 2)), chance.choice(list(BATCHING)))
        made.append((case, kinds))
    return made


def table(done: Sequence[Case]) -> str:
    """Markdown: interruptions by kind and layout, and what did not end as it should."""
    lines = [f"| interruption | {' | '.join(LAYOUTS)} |", f"|---|{'---:|' * len(LAYOUTS)}"]
    count: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for case in done:
        for kind, _, _ in case.interruptions:
            count[kind, case.layout] += 1
            failed[kind, case.layout] += case.outcome != "same"
    for kind in KINDS:
        cells = [
            f"{count[kind, layout]}"
            + (f" ({failed[kind, layout]} in runs that failed)" if failed[kind, layout] else "")
            for layout in LAYOUTS
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    same = sum(case.outcome == "same" for case in done)
    lines.append(f"\n{sum(count.values())} interruptions of {len(done)} runs; {same} runs ended with the same weights.")
    lines += [
        f"- seed {case.seed}, {case.layout}, {case.workers} workers, {case.batching}: {case.outcome}; "
        + ", ".join(f"{kind} after {moment} s at {step}" for kind, moment, step in case.interruptions)
        for case in done
        if case.outcome != "same"
    ]
    return "\n".join(lines)


def main() -> int:
    """Run cases until the time is up; returns 1 where one did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="no case begins after this (default: 600)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time; they disturb each other (default: 1)"
    )
    parser.add_argument(
        "--longest", type=float, default=30.0, help="seconds in which a job is interrupted (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments (default: 0)")
    parser.add_argument("--keep", type=Path, help="a folder for the runs (default: a temporary one)")
    options = parser.parse_args()
    if reason := hindrance():
        sys.exit(reason)
    done: list[Case] = []
    start = time.monotonic()
    FILE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        slurm = Slurm()
        try:
            driver = Driver(slurm, folder, options.longest)
            for layout in LAYOUTS:
                for batching in BATCHING:
                    driver.reference(layout, batching)

            def run(given: tuple[Case, list[str]]) -> None:
                case, kinds = given
                if time.monotonic() - start > options.seconds:
                    return
                driver.run(case, kinds)
                done.append(case)
                print(json.dumps(asdict(case)), flush=True)  # noqa: T201
                FILE.write_text(json.dumps([asdict(one) for one in done], indent=1))

            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(run, cases(options.seed)))
        finally:
            slurm.stop()
    print(table(done))  # noqa: T201
    return int(any(case.outcome != "same" for case in done))


if __name__ == "__main__":
    sys.exit(main())
