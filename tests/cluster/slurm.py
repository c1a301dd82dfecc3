"""A real SLURM of several nodes on this machine, on loopback only, and what tests do with it."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.cluster.guard import HOSTS, change_hosts, members, variables
from tests.forkserver import FIXED, ROOT

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
PACKAGES = Path(__file__).with_name("debian-packages.txt")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
"""States of a job that has ended, unless it is queued again."""

# Times are short so that tests are: a requeued job waits until the credentials of its start expire (`cred_expire`, two
# minutes by default), a node may be silent for SlurmdTimeout before its jobs are taken away, KillWait lies between
# SIGTERM and SIGKILL, and GraceTime between a preemption's SIGTERM and the job's end. There is no accounting: for
# MinJobAge the controller remembers jobs that ended.
CONFIG = """\
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
InactiveLimit=0
JobRequeue=1
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def hindrance() -> str | None:
    """Why no SLURM can be started here; None if nothing is in the way."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        packages = ", ".join(PACKAGES.read_text().split())
        return f"SLURM is not installed ({', '.join(missing)}): as root, install Debian's packages {packages}"
    if os.geteuid() != 0:
        return "SLURM's daemons need root to start jobs, and the names of nodes to be written to /etc/hosts"
    if not os.access(HOSTS, os.W_OK):
        return f"{HOSTS} cannot be written, so the nodes would have no names"
    return None


class Slurm:
    """A cluster, from its creation to `stop`.

    Its processes end, its folder and its line in /etc/hosts go, also where this process is killed: a guard waits for it
    (`tests.cluster.guard`).

    Args:
        nodes: number of nodes, n1 and so on; all are this machine.
        cpus: CPUs of each.

    Attributes:
        folder: configuration, state and logs of the daemons.
        names: the names of the nodes.

    Raises:
        TimeoutError: when a daemon does not come up.
    """

    def __init__(self, nodes: int = 4, cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o711)  # munged wants that all may reach its socket
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._scripts = itertools.count()
        guard = [sys.executable, "-m", "tests.cluster.guard", str(self.folder)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
        try:
            self._start(cpus)
        except BaseException:
            self.stop()
            raise

    def _start(self, cpus: int) -> None:
        change_hosts(f"# {self.folder}", f"127.0.0.1 {' '.join(self.names)}")
        for name in ("state", *(f"spool/{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True)
        ports = _free_ports(1 + len(self.names))
        host = platform.node()
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000"
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        text = CONFIG.format(host=host, port=ports[0], folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(text)
        subprocess.run(["mungekey", "--create", f"--keyfile={self.folder}/munge.key"], check=True)
        files = {"socket": "munge", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder}/{name}" for option, name in files.items()]
        self._daemon("munged", "munged", "-F", *options, f"--log-file={self.folder}/munge.log")
        until(lambda: (self.folder / "munge").exists(), 10, "munged does not come up", self._logs)
        self._daemon("slurmctld", "slurmctld", "-D")
        for name in self.names:
            self.start_node(name)

    # ------------------------------------------------------------------ the cluster

    def stop(self) -> None:
        """End the cluster with all that runs on it."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        for daemon in self._daemons.values():
            daemon.wait()

    def run(self, *words: str, variables: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Run a command of SLURM's, such as `scontrol`, or anything under `srun`; returns what it prints."""
        environment = self.environment | (variables or {})
        result = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=self.folder)
        assert not check or result.returncode == 0, f"{' '.join(words)}: {result.stdout}{result.stderr}"
        return result.stdout + result.stderr

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client of this cluster, and of its jobs."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        return outer | FIXED | {"SLURM_CONF": f"{self.folder}/slurm.conf", "CUDA_VISIBLE_DEVICES": ""}

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, and wait until the node takes jobs."""
        self._daemon(name, "slurmd", "-D", "-N", name)
        until(lambda: self.node_state(name) in ("IDLE", "MIXED", "ALLOCATED"), 30, f"{name} is not up", self._logs)

    def kill_node(self, name: str) -> None:
        """Kill a node at once: its daemon, and what its jobs run there."""
        doomed = [self._daemons[name].pid]
        for process in members(self.folder):
            if variables(process).get("SLURMD_NODENAME") == name or f"-N {name}" in _words(process):
                doomed.append(process.pid)
        for pid in doomed:
            _kill(pid)
        self._daemons[name].wait()

    def kill_daemon(self, name: str) -> None:
        """Kill the daemon of a node (or `slurmctld`), and leave what jobs run."""
        self._daemons[name].kill()
        self._daemons[name].wait()

    def node_state(self, name: str) -> str:
        """The state of a node, such as IDLE or DOWN, without marks behind it."""
        found = re.search(r"State=([A-Z]+)", self.run("scontrol", "show", "node", name, check=False))
        return found[1] if found else "UNKNOWN"

    def _daemon(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _logs(self) -> str:
        """The last lines of the daemons' logs."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    # ------------------------------------------------------------------ jobs

    def submit(self, folder: Path, script: str, *flags: str, variables: Mapping[str, str] | None = None) -> int:
        """Submit a job script that runs in `folder`, and prints into JOB.out there; returns the job's number.

        Args:
            folder: working folder of the job; MLflow's store is in it.
            script: the commands, below `#!/bin/bash`; `python` is this interpreter.
            flags: of `sbatch`, such as `-N2`.
            variables: environment variables of the job.
        """
        file = folder / f"job-{next(self._scripts)}.sh"
        path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
        file.write_text(f"#!/bin/bash\n{path}\n{script}\n")
        given = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"} | dict(variables or {})
        words = ["--parsable", "--open-mode=append", f"--output={folder}/%j.out", f"--chdir={folder}", *flags]
        return int(self.run("sbatch", *words, str(file), variables=given).split()[-1])

    def show(self, job: int) -> dict[str, str]:
        """What `scontrol show job` tells of a job, or of the first task of an array."""
        text = self.run("scontrol", "show", "job", str(job)).split("\n\n")[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job: int) -> str:
        """The state of a job, such as PENDING or COMPLETED."""
        return self.show(job)["JobState"]

    def wait(self, job: int, *states: str, seconds: float = 120) -> str:
        """Wait until a job is in one of these states (default: has ended, of an array all tasks); returns the state.

        Raises:
            TimeoutError: with what the job has printed.
        """
        wanted = states or OVER

        def reached() -> bool:
            shown = self.run("scontrol", "-o", "show", "job", str(job))
            return all(state in wanted for state in re.findall(r"\bJobState=(\w+)", shown))

        until(reached, seconds, f"job {job} is not {' or '.join(wanted)}", lambda: self.report(job))
        return self.state(job)

    def output(self, job: int) -> str:
        """What a job has printed so far."""
        file = Path(self.show(job)["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else ""

    def report(self, job: int) -> str:
        """State and output of a job, for the message of a failure."""
        return f"{self.run('scontrol', 'show', 'job', str(job), check=False)}\n{self.output(job)[-8000:]}"

    def until_printed(self, job: int, text: str, times: int = 1, seconds: float = 120) -> None:
        """Wait until a job has printed a text.

        Raises:
            TimeoutError: with what it has printed instead.
            AssertionError: when the job ends without.
        """

        def printed() -> bool:
            over = self.state(job) in OVER
            found = self.output(job).count(text) >= times
            assert found or not over, f"job {job} never printed {text!r}: {self.report(job)}"
            return found

        until(printed, seconds, f"job {job} has not printed {text!r}", lambda: self.report(job))

    def requeue(self, job: int) -> None:
        """Take a job off its nodes and put it in the queue again, where it waits for some seconds (`CONFIG`).

        To set its start time to now instead lets SLURM take the end of the first attempt for that of the second.
        """
        before = self.restarts(job)
        self.run("scontrol", "requeue", str(job))
        self.until_requeued(job, before + 1)

    def until_requeued(self, job: int, times: int = 1, seconds: float = 60) -> None:
        """Wait until a job was put in the queue again so often.

        Raises:
            TimeoutError: with what it has printed.
        """
        until(lambda: self.restarts(job) >= times, seconds, f"job {job} is not requeued", lambda: self.report(job))

    def restarts(self, job: int) -> int:
        """How often a job was put in the queue again."""
        return int(self.show(job)["Restarts"])

    def cancel(self, job: int) -> None:
        """End a job, and wait until nothing of it is left."""
        self.run("scancel", str(job))
        self.wait(job)

    # ------------------------------------------------------------------ processes

    def processes(self, job: int, rank: int | None = None, command: str = "") -> list[psutil.Process]:
        """Processes of a job's script and steps on all nodes, oldest first.

        Args:
            job: the job.
            rank: only those of this rank of its steps.
            command: only those with this text in their command line.
        """
        found = []
        for process in members(self.folder):
            given = variables(process)
            own = given.get("SLURM_JOB_ID") == str(job)
            ranked = rank is None or ("SLURM_STEP_ID" in given and given.get("SLURM_PROCID") == str(rank))
            if own and ranked and command in _words(process):
                found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def signal_rank(self, job: int, rank: int, number: int, command: str = "") -> None:
        """Send a signal to the oldest process of a rank whose command line has this text.

        Raises:
            AssertionError: when the rank has no such process.
        """
        found = self.processes(job, rank, command)
        assert found, f"job {job} has no process of rank {rank} with {command!r}: {self.report(job)}"
        found[0].send_signal(number)


def until(reached: Callable[[], bool], seconds: float, what: str, why: Callable[[], str]) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: with what was waited for, and why it may be late.
    """
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} after {seconds:g} s\n{why()}")
        time.sleep(0.1)


def _free_ports(number: int) -> Sequence[int]:
    """Ports of loopback that nobody listens on."""
    with ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def _words(process: psutil.Process) -> str:
    """The command line of a process; empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(pid: int) -> None:
    try:
        psutil.Process(pid).kill()
    except psutil.Error:  # it has ended
        return
