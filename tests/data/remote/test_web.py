"""Files of a web server."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_vlm.data.remote import fetch, origin_of, revision_of
from lit_vlm.data.remote.address import parse_address
from lit_vlm.data.remote.chosen import store_of
from lit_vlm.data.remote.store import PIECE, Entry, RemoteFile
from lit_vlm.data.sets.forms import open_source
from tests.data.remote.servers import Web, running
from tests.data.remote.test_hub import a_new_process
from tests.tiny import ROOT

NOISE = random.Random(1).randbytes(4 * PIECE)
TALK = json.dumps([{"id": "0", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}])


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("LIT_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lit_vlm.data.remote.store.FIRST_WAIT", 0.01)
    with running(Web({"data/noise.tar": NOISE, "data/talk me.json": TALK.encode()})) as server:
        yield server


def test_a_file_is_read_by_its_reader(web: Web, tmp_path: Path) -> None:
    source = open_source(f"{web.address}/data/talk%20me.json?key=secret")
    assert source.record(0).messages[-1].text == "!"
    assert source.name == "talk me"
    assert all("key=secret" in path for path, _ in web.bodies())
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert kept
    assert not [file for file in kept if b"secret" in file.read_bytes()]
    assert (
        origin_of(source.path or "") == f"{web.address}/data/talk me.json (revision {revision_of(source.path or '')})"
    )


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection(web: Web, ranges: bool) -> None:
    """A server that knows no ranges sends the whole file again, of which the first part is left out."""
    web.ranges = ranges
    web.faults["noise.tar"] = [PIECE + 9, None, 3 * PIECE + 9 if not ranges else PIECE + 9]
    assert fetch(f"{web.address}/data/noise.tar").path.read_bytes() == NOISE
    assert web.bodies()[-1][1] is not None


def test_a_file_that_changes_after_a_cut_is_fetched_anew(web: Web) -> None:
    answer, new = web.answer, NOISE[::-1]

    def change(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if "Range" in headers:
            web.files["data/noise.tar"] = new
        return answer(method, path, headers)

    web.answer = change  # type: ignore[method-assign]
    web.faults["noise.tar"] = [2 * PIECE]
    web.faults["noise.tar"].insert(0, 4 * PIECE)  # of the first look, which is for size and tag
    assert fetch(f"{web.address}/data/noise.tar").path.read_bytes() == new


def test_a_killed_process_is_gone_on_from(web: Web, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from lit_vlm.data.remote import cached\n"
        "append = cached._append\n"
        "def dies(*given):\n"
        "    try:\n"
        "        append(*given)\n"
        "    except OSError:\n"
        "        os._exit(9)\n"
        "cached._append = dies\n"
        "cached.fetch(sys.argv[1])\n"
    )
    address = f"{web.address}/data/noise.tar"
    web.faults["noise.tar"] = [4 * PIECE, 2 * PIECE + 9]
    assert subprocess.run([sys.executable, "-c", code, address], cwd=ROOT, check=False).returncode == 9
    web.asked.clear()
    assert fetch(address).path.read_bytes() == NOISE
    assert web.bodies()[-1][1] == f"bytes={2 * PIECE}-"


def test_what_cannot_be_had(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, said in {
        f"{web.address}/none.tar": "there is no http://.*/none.tar",
        web.address: "names no file",
        "http://127.0.0.1:9/x.tar": "http://127.0.0.1:9/x.tar cannot be reached: Connection refused",
        "https://nowhere.invalid/x.tar": "https://nowhere.invalid/x.tar cannot be reached: its host has no address",
    }.items():
        with pytest.raises(ValueError, match=said) as error:
            fetch(address)
        assert "\n" not in str(error.value)
    answer = web.answer
    web.answer = lambda *_: (403, {}, b"")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="does not give it without a login"):
        fetch(f"{web.address}/data/noise.tar")
    web.answer = answer  # type: ignore[method-assign]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=PIECE))
    a_new_process(monkeypatch)
    with pytest.raises(ValueError, match="GiB more, and .* has 0.0 GiB left: LIT_VLM_CACHE names another"):
        fetch(f"{web.address}/data/noise.tar")


def test_a_file_is_read_in_parts(web: Web) -> None:
    address = parse_address(f"{web.address}/data/noise.tar")
    file = RemoteFile(store_of(address), Entry("data/noise.tar", len(NOISE), "", ""))
    file.seek(-10, 2)
    assert file.read(100) == NOISE[-10:]
    file.seek(PIECE)
    assert (file.read(5), file.tell()) == (NOISE[PIECE : PIECE + 5], PIECE + 5)
