"""How a run begins or goes on, and how the processes of a launcher follow the first."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_vlm.checkpoints.folder import mark_done
from lit_vlm.commands.asked import Asked, ask
from lit_vlm.commands.begin import Begin, decide, together
from lit_vlm.commands.run import _parser
from lit_vlm.commands.runs import RunState


def asked(*words: str) -> Asked:
    return ask(_parser(), words)


def begun(folder: Path, *words: str) -> None:
    begin = decide(asked(*words, "--out", str(folder)))
    assert not begin.goes_on
    begin.state.save(folder)


def test_the_same_command_starts_and_goes_on(tmp_path: Path) -> None:
    words = ("llava15", "--scale", "tiny", "--data.batch_size", "2", "--trainer.devices=8")
    begun(tmp_path / "a", *words)
    mark_done(tmp_path / "a" / "1_align", 7)
    again = decide(asked(*words[:3], "--data.batch_size=2", "--trainer.devices", "4", "--out", str(tmp_path / "a")))
    assert again.goes_on
    assert again.state.done == ["1_align"]
    assert again.state.flags == ["--data.batch_size=2", "--trainer.devices", "4"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("eve", "--scale", "tiny", "--data.batch_size", "2"),
            "recipe llava15 then, eve now; stages 1_align, 2_sft then",
        ),
        (("llava15", "--scale", "7b", "--data.batch_size", "2"), "scale tiny then, 7b now"),
        (("llava15", "--scale", "tiny", "--stages", "2_sft", "--data.batch_size", "2"), "2_sft then, 2_sft now"),
        (("llava15", "--scale", "tiny"), "--data.batch_size 2 then, not now"),
        (("llava15", "--scale", "tiny", "--data.batch_size", "4"), "--data.batch_size 4 now, not then"),
        (("llava15", "--scale", "tiny", "--data.batch_size", "2", "--seed_everything", "1"), "--seed_everything 1 now"),
    ],
)
def test_another_command_is_refused_with_the_difference(words: tuple[str, ...], named: str, tmp_path: Path) -> None:
    begun(tmp_path / "a", "llava15", "--scale", "tiny", "--data.batch_size", "2")
    with pytest.raises(ValueError, match="a holds the run of another command") as info:
        decide(asked(*words, "--out", str(tmp_path / "a")))
    assert named in str(info.value)
    assert "Choose another --out" in str(info.value)


def test_resume_takes_another_number_of_devices_and_nothing_else(tmp_path: Path) -> None:
    begun(tmp_path / "a", "llava15", "--scale", "tiny", "--trainer.devices", "8", "--seed_everything", "1")
    out = ("--out", str(tmp_path / "a"))
    assert decide(asked("--resume", *out)).state.flags == ["--trainer.devices", "8", "--seed_everything", "1"]
    fewer = decide(asked("--resume", *out, "--trainer.devices", "4", "--trainer.num_nodes=2"))
    assert fewer.state.flags == ["--seed_everything", "1", "--trainer.devices", "4", "--trainer.num_nodes=2"]
    with pytest.raises(ValueError, match=r"besides --out it takes --trainer.devices and .*, not --seed_everything"):
        decide(asked("--resume", *out, "--seed_everything", "2"))


def test_a_second_experiment_of_one_job_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    found = []
    for words in (("--seed_everything", "1"), ("--seed_everything", "2"), ("--seed_everything", "1")):
        begin = decide(asked("llava15", "--scale", "tiny", *words))
        begin.state.save(begin.folder)
        found.append((str(begin.folder), begin.goes_on))
    first, second = "runs/llava15-tiny-12", "runs/llava15-tiny-12-2"
    assert found == [(first, False), (second, False), (first, True)]


NAMED = {"TORCHELASTIC_RUN_ID": "mine"}
NAMELESS = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "2"}
"""torchrun on several machines, with and without --rdzv-id."""


def _rank(
    rank: int, given: dict[str, str], out: str, decided: Callable[[Asked], Begin], results: multiprocessing.Queue
) -> None:  # type: ignore[type-arg]
    os.environ |= given | {"RANK": str(rank), "WORLD_SIZE": "3"}
    try:
        with together(asked("llava15", "--scale", "tiny", "--out", out), decided) as begin:
            results.put((rank, str(begin.folder), begin.state.flags))
    except ValueError as error:
        results.put((rank, str(error), None))


def _follow(
    given: dict[str, str], out: str, decided: Callable[[Asked], Begin]
) -> dict[int, tuple[str, list[str] | None]]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, given, out, decided, results)) for rank in (2, 1, 0)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join(60)
    return {rank: (said, flags) for rank, said, flags in found}


@pytest.mark.parametrize("given", [NAMED, NAMELESS], ids=["named", "nameless"])
def test_all_processes_do_what_the_first_decides(given: dict[str, str], tmp_path: Path) -> None:
    def decided(given: Asked) -> Begin:
        return Begin(tmp_path / "elsewhere", RunState("llava15", "tiny", "ddp", ["2_sft"], ["--x"]), goes_on=False)

    out = tmp_path / "runs" / "a"
    assert _follow(given, str(out), decided) == dict.fromkeys(range(3), (str(tmp_path / "elsewhere"), ["--x"]))
    assert list(out.parent.iterdir()) == [out.parent / ".launches"]


def test_all_processes_end_where_the_first_refuses(tmp_path: Path) -> None:
    def decided(given: Asked) -> Begin:
        raise ValueError("no such thing")

    found = _follow(NAMED, str(tmp_path / "a"), decided)
    assert found[0] == ("no such thing", None)
    assert found[1] == ("process 1 ends, as the first one refused: no such thing", None)
    assert found[2] == ("process 2 ends, as the first one refused: no such thing", None)
