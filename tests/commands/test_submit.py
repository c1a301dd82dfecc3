"""`lit-vlm submit`: what it refuses, the script it writes, and what that script does when a run ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from lit_vlm.checkpoints.progress import Progress, now
from lit_vlm.cluster.queue import Submitted, states
from lit_vlm.cluster.sbatch import Job, script
from lit_vlm.cluster.site import VARIABLE, Site, read_site, site_file
from lit_vlm.cluster.status import exit_code
from lit_vlm.commands import follow as following
from lit_vlm.commands import submit
from lit_vlm.commands.runs import RunState
from lit_vlm.core.times import seconds_of

TINY = ["llava15", "--scale", "tiny", "--strategy", "ddp", "--gpus", "0"]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a blank in its name, and the file of the site, which does not exist."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    return tmp_path / "config" / "lit-vlm" / "cluster.yaml"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The flags of stages that would be checked, which takes seconds."""
    found: list[Sequence[str]] = []
    monkeypatch.setattr(submit, "check_commands", found.extend)
    return found


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A function that puts a program into the PATH; returns the file with its arguments, one a line."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")

    def make(name: str, body: str) -> Path:
        said = tmp_path / f"{name}.said"
        (place / name).write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >>'{said}'\n{body}\n")
        (place / name).chmod(0o755)
        return said

    return make


def job(folder: str = "runs/it's a run", **changes: object) -> Job:
    settings = {"name": "llava15-7b", "folder": Path(folder), "command": ["run", "llava15", "--data.root", "a b"],
                "nodes": 2, "gpus": 8, "tasks": 8, "site": Site()} | changes  # fmt: skip
    return Job(**settings)  # type: ignore[arg-type]


def ends(
    program: Callable[[str, str], Path], made: Job, code: int, saves: str = "", check: bool = True, **variables: str
) -> tuple[int, Path]:
    """Run the script where the run ends with a code; returns the script's own, and what scontrol was asked."""
    made.folder.mkdir(parents=True, exist_ok=True)
    program("srun", f"{saves}\nexit {code}")
    asked = program("scontrol", "")
    file = made.folder / "job.sh"
    file.write_text(script(made))
    done = subprocess.run(["bash", str(file)], env=os.environ | {"SLURM_JOB_ID": "7"} | variables, capture_output=True)
    return done.returncode, asked


def saves(folder: str, step: int) -> str:
    place = f'"{folder}/1_align/checkpoints"'
    return f"mkdir -p {place}; : >{place}/step={step:08d}.ckpt"


# ------------------------------------------------------------------ the script


@pytest.mark.parametrize("code", [75, 69, 137])  # it left in order, a process of it was lost, or one was killed
def test_a_run_that_can_go_on_is_put_into_the_queue_again(program: Callable[[str, str], Path], code: int) -> None:
    made = job()
    returned, asked = ends(program, made, code, saves(str(made.folder), 5))
    assert returned == code
    assert asked.read_text().split() == ["requeue", "7"]
    assert exit_code(made.folder) == code


@pytest.mark.parametrize("code", [0, 1, 70])
def test_any_other_end_is_the_end(program: Callable[[str, str], Path], code: int) -> None:
    made = job()
    returned, asked = ends(program, made, code)
    assert returned == code
    assert not asked.exists()
    assert exit_code(made.folder) == code


def test_a_job_that_gets_nowhere_twice_in_a_row_stops(program: Callable[[str, str], Path]) -> None:
    made = job()
    where = str(made.folder)

    def requeues(*given: str) -> int:
        asked = ends(program, made, 75, *given)[1]
        return asked.read_text().split().count("requeue") if asked.exists() else 0

    assert requeues() == 1  # taken away while it loaded
    assert requeues(saves(where, 5)) == 2
    assert requeues(saves(where, 5)) == 3
    assert requeues(saves(where, 9)) == 4  # got on, so it counts anew
    assert requeues() == 5
    assert requeues() == 5
    assert requeues(f': >"{where}/1_align/done.json"') == 6  # a stage that has ended is progress too


def test_another_job_of_the_same_run_counts_anew(program: Callable[[str, str], Path]) -> None:
    made = job()
    for number in ("7", "8"):
        asked = ends(program, made, 75, SLURM_JOB_ID=number)[1]
    assert asked.read_text().split() == ["requeue", "7", "requeue", "8"]


def test_a_task_of_an_array_puts_itself_into_the_queue_and_no_other(program: Callable[[str, str], Path]) -> None:
    made = job(seeds=(0, 3))
    variables = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}  # the number of the last task is the array's
    _, asked = ends(program, made, 75, **variables)
    assert asked.read_text().split() == ["requeue", "7_3"]
    assert exit_code(made.folder / "seed-3") == 75


def test_words_reach_the_run_as_they_are(program: Callable[[str, str], Path], tmp_path: Path) -> None:
    words = ["run", "my recipe", "--model.x", "$HOME `date` \"q\" 'p' *", "--y", ""]
    made = job(command=words, seeds=(3,))
    ends(program, made, 0, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="6")
    assert (tmp_path / "srun.said").read_text().split("\n")[:-1] == [
        "--kill-on-bad-exit=1", "--cpus-per-task=6", sys.executable, "-P", "-m", "lit_vlm", *words,
        "--out", "runs/it's a run/seed-3", "--seed_everything", "3",
    ]  # fmt: skip


def test_environment_of_the_site_is_filled_in_on_the_node_and_runs_nothing(
    program: Callable[[str, str], Path], tmp_path: Path
) -> None:
    environment = {"A": "$HOST_OF_IT/a b", "B": '$(touch bad) `touch bad` "x" 5$'}
    settings = Site(environment=environment, local_cache="/scratch/$HOST_OF_IT", prologue=("HOST_OF_IT=n1",))
    ends(program, job(site=settings), 0, 'printf "%s\\n" "$A" "$B" "$TRITON_CACHE_DIR" "$OMP_NUM_THREADS" >"$T"',
         T=str(tmp_path / "told"), SLURM_CPUS_PER_TASK="6", HOST_OF_IT="n0")  # fmt: skip
    told = (tmp_path / "told").read_text().splitlines()
    assert told[:2] == ["n1/a b", '$(touch bad) `touch bad` "x" 5$']
    assert told[2].startswith("/scratch/n0/lit-vlm-")  # known before the site's lines
    assert told[3] == "6"
    assert not Path("bad").exists()


def test_options_of_sbatch() -> None:
    settings = Site(
        partition="gpu", time="2-0", cpus_per_gpu=12, mem="0", signal_before=300, sbatch=("--constraint=h100",)
    )
    text = script(job("runs/a 5%", site=settings, seeds=(0, 1, 2)), {"HF_HOME": "/h f", "HF_TOKEN": "secret"})
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options == [
        "--job-name=llava15-7b", "--partition=gpu", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--cpus-per-task=12", "--mem=0", "--time=2-0", "--array=0-2", "--signal=USR1@300", "--open-mode=append",
        f'--output="{Path.cwd()}/runs/a 5%%/logs/%A_%a.out"', "--requeue", "--constraint=h100",
    ]  # fmt: skip
    assert "export HF_HOME='/h f'\n" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (
            "pyxis",
            "--container-image=my/image:1 --container-mounts={here}:{here},/data:/data --container-workdir={here}",
        ),
        ("apptainer", "apptainer exec --nv --bind {here},/data --pwd {here} my/image:1"),
    ],
)
def test_containers(program: Callable[[str, str], Path], tmp_path: Path, container: str, words: str) -> None:
    made = job(site=Site(container=container, mounts=("/data",)), image="my/image:1")
    ends(program, made, 0)
    said = (tmp_path / "srun.said").read_text().split("\n")[:-1]
    here = str(Path.cwd())
    assert said[1:] == [word.format(here=here) for word in words.split(" ")] + [
        "lit-vlm", "run", "llava15", "--data.root", "a b", "--out", "runs/it's a run",
    ]  # fmt: skip
    assert "PYTHONPATH" not in script(made, {"PYTHONPATH": "/here"})


# ------------------------------------------------------------------ settings of the site


def test_without_a_file_the_defaults_hold(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site_file() == site
    assert read_site() == Site()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other.yaml"))
    with pytest.raises(ValueError, match=r"other.yaml \(LIT_VLM_CLUSTER\) cannot be read"):
        read_site()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: gpu", "there is no key 'partitoin' (did you mean 'partition'?); keys: partition, account"),
        ("- gpu", "holds settings of a cluster, such as 'partition: gpu', not a list"),
        ("a: [", "cannot be read"),
        ("mem: 1G\nmem: 2G", "cannot be read: the key 'mem' stands here and in line 1; a key stands once"),
        ("cpus_per_gpu: many", "cpus_per_gpu: Input should be a valid integer"),
        ("container: docker", "container: Input should be 'pyxis' or 'apptainer', found 'docker'"),
        ("time: soon", "time 'soon' is no length of time: write minutes (90), hours (24:00:00)"),
        ("time: 4", "time 4 is 240 s, and a run is told to save 180 s before the end"),
        ("sbatch: [exclusive]", "sbatch: these are options of sbatch, such as --constraint=h100, unlike 'exclusive'"),
        ("environment: {a-b: 1}", "environment: 'a-b' is no name of an environment variable"),
    ],
)
def test_a_wrong_file_is_refused(site: Path, text: str, message: str) -> None:
    site.parent.mkdir(parents=True)
    site.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(site))}.*{re.escape(message)}"):
        read_site()


def test_values_are_read_as_they_are_written(site: Path) -> None:
    site.parent.mkdir(parents=True)
    site.write_text("time: 24:00:00\nmem: 0\ncpus_per_gpu: 12\nqos: null\nenvironment: {A: on, B: 010}\n")
    assert read_site() == Site(time="24:00:00", mem="0", cpus_per_gpu=12, environment={"A": "on", "B": "010"})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200), ("1-0:0:5", 86405),
     ("1h", None), ("", None), ("1:2:3:4", None)],
)  # fmt: skip
def test_lengths_of_time_are_slurm_s(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_flags_win_over_the_file(
    site: Path, unchecked: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    site.parent.mkdir(parents=True)
    site.write_text(yaml.safe_dump({"partition": "low", "account": "lab", "time": 60, "cpus_per_gpu": 2}))
    submit.main([*TINY, "--dry-run", "--partition", "high", "--time", "1-0", "--tasks", "3", "--nodes", "2"])
    shown = capsys.readouterr().out
    for option in ("partition=high", "account=lab", "time=1-0", "cpus-per-task=2", "ntasks-per-node=3", "nodes=2"):
        assert f"#SBATCH --{option}\n" in shown
    assert "gpus-per-node" not in shown
    assert "--trainer.devices 3 --trainer.num_nodes 2 --trainer.accelerator cpu --out" in shown
    assert f"MLFLOW_TRACKING_URI='sqlite:///{Path.cwd()}/mlflow.db'" in shown
    assert [words[0] for words in unchecked] == ["fit", "fit"]
    assert not Path("runs").exists()
    assert subprocess.run(["bash", "-n"], input=shown, text=True).returncode == 0


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time", "1 day"], "--time '1 day' is no length of time"),
        (["--nodes", "0"], "--nodes is at least 1, not 0"),
        (["--gpus", "8", "--tasks", "2"], "--tasks is for machines without GPUs"),
        (["--trainer.devices", "4"], "--trainer.devices is not for lit-vlm submit: use --gpus"),
        (["--trainer.num_nodes=4"], "--trainer.num_nodes is not for lit-vlm submit: use --nodes"),
        (["--resume"], "--resume is not for lit-vlm submit: use the same command again"),
        (["--array-of", "0-3,2"], "--array-of 0-3,2 names a seed twice"),
        (["--array-of", "3-1"], "'3-1' is no seed and no range of seeds"),
        (["--array-of", "a"], "'a' is no seed and no range of seeds; write 0,1,2 or 0-7"),
        (["--array-of", "0,1", "--seed_everything", "3"], "--seed_everything and --array-of both say the seed"),
        (["--out", "a\\b"], "SLURM takes no '\\\\' in the name of a folder"),
        (["--stages", "1_alien"], "has no stage '1_alien' (did you mean '1_align'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        submit.main([*TINY, "--dry-run", *flags])
    assert not Path("runs").exists()


def test_a_wrong_flag_of_a_stage_is_refused_as_run_does(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        submit.main(
            [*TINY, "--dry-run", "--nodes", "2", "--out", "r", "--stages", "1_align", "--model.stage.warm", "1"]
        )
    assert refused.value.code == 1
    assert "model.stage.warm" in capfd.readouterr().err
    assert not Path("r").exists()


def test_without_sbatch_or_a_recipe(program: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name a recipe, as the first argument: "):
        submit.main(["--dry-run"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no sbatch on the PATH.*--dry-run"):
        submit.main(TINY)


def test_what_sbatch_says_is_told(program: Callable[[str, str], Path], unchecked: list[Sequence[str]]) -> None:
    program("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(ValueError, match="sbatch refuses r/job.sh: invalid partition specified: x"):
        submit.main([*TINY, "--out", "r", "--partition", "x"])


def test_a_job_is_submitted_once_and_the_same_command_submits_it_again(
    program: Callable[[str, str], Path], unchecked: list[Sequence[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    said = program("sbatch", "echo '12;cluster'")
    program("squeue", "echo '12|12_N/A|PENDING|Priority'")
    command = [*TINY, "--out", "r s", "--trainer.max_steps", "5"]
    submit.main(command)
    assert said.read_text().split("\n")[:-1] == ["--parsable", "r s/job.sh"]
    shown = capsys.readouterr().out
    assert "tail -F 'r s/logs'/12.out\nto end it: scancel 12" in shown
    assert Submitted.load(Path("r s")) == Submitted("12", ("1_align", "2_sft"))
    with pytest.raises(ValueError, match=r"job 12 of r s is pending \(Priority\): scancel 12 first"):
        submit.main(command)
    program("squeue", "echo '12|12_N/A|TIMEOUT|None'")
    flags = ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.accelerator", "cpu"]
    begun = RunState("llava15", "tiny", "ddp", ["1_align", "2_sft"], [*flags, "--trainer.max_steps", "5"])
    begun.save(Path("r s"))
    submit.main(command)
    with pytest.raises(
        ValueError, match="r s holds the run of another command: .* 5 then, not now; .* 6 now, not then"
    ):
        submit.main([*command[:-1], "6"])


def test_an_array_has_a_folder_for_each_seed(
    program: Callable[[str, str], Path], unchecked: list[Sequence[str]]
) -> None:
    program("sbatch", "echo 12")
    program("squeue", "")
    submit.main([*TINY, "--out", "r", "--array-of", "0-1,5"])
    assert "#SBATCH --array=0,1,5\n" in Path("r/job.sh").read_text()
    assert [Submitted.load(Path(f"r/seed-{seed}")).job for seed in (0, 1, 5)] == ["12_0", "12_1", "12_5"]  # type: ignore[union-attr]
    program("squeue", "echo '13|12_1|RUNNING|None'")
    with pytest.raises(ValueError, match="job 12_1 of r/seed-1 is running"):
        submit.main([*TINY, "--out", "r", "--array-of", "0-1,5"])


@pytest.mark.parametrize(("last", "noted", "code"), [("COMPLETED", 0, 0), ("FAILED", 3, 3), ("CANCELLED", None, 1)])
def test_a_job_is_followed_to_its_end(
    program: Callable[[str, str], Path],
    unchecked: list[Sequence[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    last: str,
    noted: int | None,
    code: int,
) -> None:
    monkeypatch.setattr(following, "PERIOD", 0.01)
    program("sbatch", "echo 12")
    log = (
        f"mkdir -p r; printf 't\\t12\\tstart\\t\\t\\nt\\t12\\t{noted}\\t\\ton\\t\\n' >r/attempts.tsv"
        if noted is not None
        else ""
    )
    program("squeue", f"""
if [ ! -e one ]; then touch one; echo '12|12_N/A|PENDING|Resources'
elif [ ! -e two ]; then touch two; echo '12|12_N/A|RUNNING|None'
else {log or ":"}; echo '12|12_N/A|{last}|None'; fi""")  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        submit.main([*TINY, "--out", "r", "--wait"])
    assert ended.value.code == code
    shown = capsys.readouterr().out
    assert "job 12 pending (Resources), waiting\njob 12 running, starting\n" in shown


def test_following_shows_the_step_and_stops_on_ctrl_c_without_ending_the_job(
    program: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Submitted("12", ("1_align",)).save(Path("r"))
    Progress(30, 100, 10, 5000.0, now(), now(), "elsewhere", 1, "12", "training").write(Path("r/1_align"))
    asked = program("scancel", "")
    program("squeue", "echo '12|12_N/A|RUNNING|None'")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(following, "time", SimpleNamespace(sleep=interrupt))
    assert following.follow([Path("r")], Console()) == 130
    shown = capsys.readouterr().out
    assert "job 12 running, training, 1_align 30 of 100, 5,000 tokens/s" in shown
    assert "no longer followed; the job goes on" in shown
    assert not asked.exists()


def test_what_squeue_has_forgotten_is_asked_of_the_accounting(program: Callable[[str, str], Path]) -> None:
    program("squeue", "echo '3|3_N/A|RUNNING|None'; echo '9|8_2|PENDING|None'")
    program("sacct", "echo '1|CANCELLED by 1000'")
    found = states(["1", "2", "3", "8_2", "9"])
    assert found is not None
    assert {name: one.state for name, one in found.items()} == {
        "1": "CANCELLED", "3": "RUNNING", "8_2": "PENDING", "9": "PENDING",
    }  # fmt: skip
    program("squeue", "exit 1")
    assert states(["3"]) is None
