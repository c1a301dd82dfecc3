"""Ray's workers do what local ones do, and nobody's death matters."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from lit_vlm import __version__
from lit_vlm.commands.cli import main
from lit_vlm.data.sets.engine import HERE
from lit_vlm.data.sets.on_ray import DEATHS, on_ray
from lit_vlm.data.sets.parallel import Block, blocks_of
from tests.forkserver import FIXED
from tests.watched import Watched

RECORDS, SIZE = 640, 32
FORM = f"{Watched.__module__}.{Watched.__name__}"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of one node with two CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in FIXED.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    return nodes


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"document {number}\n" for number in range(RECORDS)))
    return file


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def reads(texts: Path) -> list[tuple[int, int]]:
    """(process, index) of all records that were read, in order."""
    log = texts.with_suffix(".log")
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(process), int(index)) for process, index in (line.split() for line in lines)]


def begin(texts: Path, out: Path) -> subprocess.Popen[str]:
    words = ["-m", "lit_vlm", "data", "convert", str(texts), str(out), "--form", FORM, "--on", "ray"]
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=texts.parent,
        env=os.environ | FIXED,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(command: subprocess.Popen[str]) -> str:
    said, _ = command.communicate(timeout=200)
    assert command.returncode == 0, said
    return said


def until(condition: Callable[[], object], command: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alone(texts: Path) -> dict[str, bytes]:
    """What one process converts; its reads are not written down."""
    log = texts.with_suffix(".log")
    before = log.read_bytes()
    main(["data", "convert", str(texts), str(texts.parent / "alone"), "--form", FORM, "--workers", "0"])
    log.write_bytes(before)
    return tree(texts.parent / "alone")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line by which a command refuses."""
    with pytest.raises(SystemExit):
        main(["data", *arguments])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def write_mix(folder: Path, png: Callable[..., bytes], records: int) -> str:
    """A file of samples, the first 40 with a picture, of which 5 are damaged."""
    rows = []
    for index in range(records):
        shown = index < 40
        turns = [{"from": "human", "value": f"{'<image>' * shown}q{index}"}, {"from": "gpt", "value": f"a {index}"}]
        rows.append({"id": str(index), "conversations": turns} | ({"image": f"{index}.png"} if shown else {}))
        if shown:
            (folder / f"{index}.png").write_bytes(png(8 + index, 9) if index % 9 else b"damaged")
    (folder / "mix.json").write_text(json.dumps(rows))
    return str(folder / "mix.json")


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints, but for its progress, whose lines depend on time."""
    main(["data", *arguments])
    return "\n".join(
        line for line in capsys.readouterr().out.splitlines() if not re.search(r": [\d,]+ of [\d,]+", line)
    )


def test_a_set_is_the_same_as_one_made_here(
    cluster: Cluster, tmp_path: Path, png: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    mix = write_mix(tmp_path, png, 100)
    words = ("--max-bad-share", "0.1", "--workers")
    own = result(capsys, "convert", mix, str(tmp_path / "own"), *words, "0")
    assert "left out: corrupt_image │ 5 " in own
    rays = result(capsys, "convert", mix, str(tmp_path / "ray"), *words, "1", "--on", "ray")
    # The title of a table may be broken inside a path.
    assert "".join(rays.split()).replace("/ray", "/own") == "".join(own.split())
    assert tree(tmp_path / "ray") == tree(tmp_path / "own")


@pytest.mark.slow
def test_check_and_stats_say_the_same_as_here(
    cluster: Cluster,
    tmp_path: Path,
    png: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "set")
    main(["data", "convert", write_mix(tmp_path, png, 2100), out])
    said = []
    for on in (("--workers", "0"), ("--on", "ray", "--workers", "2")):
        monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / f"cache-{len(said)}"))  # where statistics are kept
        capsys.readouterr()
        said.append([result(capsys, verb, out, *on) for verb in ("check", "stats")])
    assert said[0] == said[1]
    assert "is whole" in said[0][0]
    assert "2,095" in said[0][1]
    chunk = max((tmp_path / "set").glob("chunk-*.bin"))
    assert b"q2099" in chunk.read_bytes()
    chunk.write_bytes(chunk.read_bytes().replace(b"q2099", b"q2098"))
    with pytest.raises(SystemExit):
        main(["data", "check", out, "--on", "ray"])
    assert "record 2094: differs from its entry in records/" in capsys.readouterr().out


@pytest.mark.slow
def test_results_come_in_order_and_errors_keep_their_kind(cluster: Cluster) -> None:
    blocks = blocks_of(40, 2)
    with on_ray(2) as engine:
        assert list(engine.map(_late_if_early, blocks, [])) == [block.index for block in blocks]
        with pytest.raises(KeyError, match="no block 7"):
            list(engine.map(_fails, blocks, []))
        with pytest.raises(ValueError, match="does not see /nowhere: it must lie in a folder that all nodes share"):
            list(engine.map(_fails, blocks, ["/nowhere"]))
    assert list(HERE.map(_late_if_early, blocks[-2:], [])) == [18, 19]


def _late_if_early(block: Block) -> int:
    time.sleep(0.3 if block.index == 0 else 0)
    return block.index


def _fails(block: Block) -> int:
    if block.index == 7:
        raise KeyError("no block 7")
    return block.index


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_block(cluster: Cluster, texts: Path) -> None:
    out = texts.parent / "out"
    command = begin(texts, out)
    until(lambda: len(reads(texts)) > 3 * SIZE, command)
    held = texts.with_suffix(".held")
    held.touch()  # what is left waits for the worker that comes, however long that takes
    os.kill(reads(texts)[-1][0], signal.SIGKILL)
    until(lambda: len({process for process, _ in reads(texts)}) == 3, command)
    held.unlink()
    said = end(command)
    assert f"of {RECORDS}" in said
    found = reads(texts)
    assert len({process for process, _ in found}) == 3
    twice = [index for index, count in Counter(index for _, index in found).items() if count > 1]
    assert 0 < len(twice) <= SIZE
    assert len({index // SIZE for index in twice}) == 1
    assert tree(out) == alone(texts)


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(cluster: Cluster, texts: Path) -> None:
    out = texts.parent / "out"
    first = begin(texts, out)
    until(lambda: len(list((out / "parts").glob("*/part.json"))) > 3, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    workers = {process for process, _ in reads(texts)}
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{process}") for process in workers):
        assert time.monotonic() < deadline, "workers outlive the command that is gone"
        time.sleep(0.1)
    whole = len(list((out / "parts").glob("*/part.json")))
    end(begin(texts, out))
    found = Counter(index for _, index in reads(texts))
    assert sum(found.values()) - RECORDS <= 2 * SIZE
    assert max(found.values()) == 2
    assert whole > 3
    assert tree(out) == alone(texts)


@pytest.mark.slow
def test_a_record_that_ends_its_workers_is_named_and_what_is_whole_is_kept(
    cluster: Cluster, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts.with_suffix(".fatal").write_text("100")
    out = texts.parent / "out"
    words = ["convert", str(texts), str(out), "--form", FORM, "--on", "ray"]
    line = refused(capsys, *words)
    assert f"workers of Ray died {DEATHS} times of records 96 to 127; blocks that are whole are kept" in line
    texts.with_suffix(".fatal").unlink()
    before = len(list((out / "parts").glob("*/part.json")))
    log = len(reads(texts))
    main(["data", *words])
    assert len(reads(texts)) - log == RECORDS - before * SIZE
    assert tree(out) == alone(texts)


@pytest.mark.slow
def test_another_version_of_the_kit_or_none_is_told(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = texts.parent / "old" / "lit_vlm"
    package.mkdir(parents=True)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    words = ["convert", str(texts), str(texts.parent / "out"), "--on", "ray"]
    try:
        (package / "__init__.py").write_text('__version__ = "0.0.1"\n')
        assert f"has lit-vlm 0.0.1, here it is {__version__}: install the same" in refused(capsys, *words)
        (package / "__init__.py").write_text("import nothing_that_is_here\n")
        line = refused(capsys, *words)
        assert "cannot import lit-vlm (No module named 'nothing_that_is_here')" in line
        assert f"which is {__version__} here: install the same version on all nodes" in line
    finally:
        cluster.shutdown()
    assert not list((texts.parent / "out" / "parts").glob("0*"))


@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_and_ends(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in FIXED.items():
        monkeypatch.setenv(name, value)
    main(["data", "convert", str(texts), str(texts.parent / "out"), "--form", FORM, "--on", "ray", "--workers", "2"])
    assert not ray.is_initialized()
    assert {process for process, _ in reads(texts)}.isdisjoint({os.getpid()})
    assert tree(texts.parent / "out") == alone(texts)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:10001", "head"])
def test_an_address_without_a_cluster_is_refused_soon(
    address: str, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(port=free.getsockname()[1])
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    line = refused(capsys, "convert", str(texts), str(texts.parent / "out"), "--on", "ray")
    assert time.monotonic() - start < 10
    assert f"RAY_ADDRESS={address}" in line
    assert ("start one by `ray start --head`" in line) == ("no Ray cluster answers" in line)
    assert not (texts.parent / "out").exists()


def test_what_is_asked_of_ray_in_vain(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(texts), str(texts.parent / "out"), "--on", "ray"]
    assert "--workers 0 works in this process, which --on ray never does" in refused(capsys, *words, "--workers", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        assert "but torchrun started 2 of it: start one, or leave --on ray out" in refused(capsys, *words)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--on ray needs the package ray: pip install 'lit-vlm[ray]'" in refused(capsys, *words)
