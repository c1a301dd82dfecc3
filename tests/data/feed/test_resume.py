"""Resume is exact: the ids of the samples that are seen, through Lightning's own loop, stopped anywhere."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.data.trace import MIXTURES, Stop, run
from tests.forkserver import interpreter
from tests.runs import environment


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batching", ["Padded", "Packed", "ModalityLength"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("epoch", [0, 1])
def test_no_sample_is_lost_or_repeated(mixture: str, batching: str, workers: int, epoch: int, tmp_path: Path) -> None:
    if workers and (batching == "ModalityLength" or mixture == "interleaved"):
        pytest.skip("the same code as for the others: what workers do not see")
    whole = run(tmp_path / "whole", mixture, batching, workers)
    stop = epoch * len(whole) // 3 + 3  # three epochs
    with pytest.raises(Stop):
        run(tmp_path / "cut", mixture, batching, workers, stop_after=stop)
    rest = run(tmp_path / "cut", mixture, batching, workers, resume=True)
    assert rest == whole[stop:]
    assert len(rest) > 3
    # What was seen of each source goes on being counted.
    for out, kind in (("whole", "new"), ("cut", "resumed")):
        assert counted(tmp_path / out, kind, 1) == Counter(identity.split()[0] for step in whole for identity in step)


def counted(folder: Path, kind: str, devices: int) -> Counter[str]:
    """Samples of each source over all ranks."""
    found = [json.loads((folder / f"counts-{kind}-{rank}.json").read_text()) for rank in range(devices)]
    return Counter(found[0][0]) + sum((Counter(new) for _, new in found), Counter())


@pytest.mark.slow
def test_two_processes_resume_and_one_takes_up_what_two_left(tmp_path: Path) -> None:
    def trace(out: str, *arguments: str) -> list[list[list[str]]]:
        words = [interpreter(), "-m", "tests.data.trace", str(tmp_path / out), *arguments]
        result = subprocess.run(words, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        files = sorted((tmp_path / out).glob(f"trace-{'resumed' if '--resume' in arguments else 'new'}-*.json"))
        return [json.loads(file.read_text()) for file in files]

    two = trace("whole", "--devices", "2")
    trace("cut", "--devices", "2", "--stop", "11")
    assert trace("cut", "--devices", "2", "--resume") == [rank[11:] for rank in two]
    seen = Counter(identity.split()[0] for rank in two for step in rank for identity in step)
    assert counted(tmp_path / "whole", "new", 2) == counted(tmp_path / "cut", "resumed", 2) == seen
    # One process with twice the rows goes on where two stopped.
    trace("again", "--devices", "2", "--stop", "11")
    (alone,) = trace("again", "--devices", "1", "--resume")
    assert alone == [a + b for a, b in zip(two[0][11:], two[1][11:], strict=True)]


def test_a_changed_mixture_refuses_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run(tmp_path, "weighted", "Packed", 0, stop_after=3)
    with pytest.raises(ValueError, match=r"cannot go on exactly.*mixture: .*Weighted.*then, .*Shuffled"):
        run(tmp_path, "shuffled", "Packed", 0, resume=True)
