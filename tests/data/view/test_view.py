"""The page to look at records: by HTTP, and in a browser."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from lit_vlm.commands.cli import main
from lit_vlm.core.batch import IGNORE
from lit_vlm.data import ChatML, Native
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sets.forms import open_source
from lit_vlm.data.sources import ChatJsonl, Converted, Source
from lit_vlm.data.view.find import WINDOW, Query, draw, find
from lit_vlm.data.view.left_out import LeftOuts, beside
from lit_vlm.data.view.measures import read_measures
from lit_vlm.data.view.records import Records
from lit_vlm.data.view.server import Viewer, make_server
from tests.data.made import Count
from tests.runs import environment

EVIL = "</script><img src=x onerror=alert(1)><b id=evil>"
URL = "https://pictures.example.org/3.png"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about pictures, the last but one with a picture that is not there, the last one no JSON."""
    folder = tmp_path_factory.mktemp("view")
    lines = []
    for index in range(9):
        if index < 8:
            colour = (20 * index, 90, 200 - 20 * index)
            PILImage.new("RGB", (40 + index, 30), colour).save(folder / f"{index}.png")
        parts = [{"type": "image", "image": f"{index}.png"}, {"type": "text", "text": f"What is {index}? {EVIL}"}]
        said = [
            {"type": "text", "text": "I see ", "loss": False},
            {"type": "text", "text": f"number {index}" + " so" * index},
        ]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
        row = {"id": f"chat/{index}", "messages": turns}
        lines.append(json.dumps(row | {"url": URL} if index == 3 else row))
    (folder / "chats.jsonl").write_text("\n".join([*lines, "{broken"]))
    return folder / "chats.jsonl"


@pytest.fixture(scope="module")
def made(chats: Path) -> Path:
    """What was converted of them; two could not be used."""
    convert(open_source(str(chats)), chats.parent / "set", max_bad_share=0.5)
    return chats.parent / "set"


@pytest.fixture
def encode(bytes_spec: InputSpec) -> SampleEncoder:
    return SampleEncoder(bytes_spec, ChatML(), Native(longest=40), 2000)


@contextmanager
def shown(*sources: Source, encode: SampleEncoder | None = None, **given: Any) -> Iterator[str]:
    """The address of a page over sources."""
    records = Records(sources, encode, given.get("measures"))
    server = make_server(Viewer(records, LeftOuts(given.get("left_out", ())), "a model" if encode else ""))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(address: str, path: str, **query: Any) -> Any:
    given = urllib.parse.urlencode({key.replace("__", "."): value for key, value in query.items()})
    return json.loads(urllib.request.urlopen(f"{address}{path}?{given}", timeout=30).read())


def refused(address: str, path: str, **query: Any) -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(address, path, **query)
    return error.value.code, json.loads(error.value.read())["error"]


def indices(answer: Any) -> list[int]:
    return [match["index"] for match in answer["matches"]]


# ----- safety -----


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_inline_script(made: Path) -> None:
    with shown(Converted(str(made))) as address:
        for path in ("/", "/page.js", "/page.css", "/api/set", "/api/picture?index=0"):
            answer = urllib.request.urlopen(f"{address}{path}")
            policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in answer.headers
            if path == "/":
                text = answer.read().decode()
                assert "http" not in text
                assert text.count("<script") == text.count("<script src=") == 1
            if path == "/page.js":
                assert b"innerHTML" not in answer.read()


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("", 403), ("localhost:9", 200), ("127.0.0.1", 200)],
)
def test_a_name_that_is_made_to_lead_here_gets_no_answer(host: str, status: int, made: Path) -> None:
    with shown(Converted(str(made))) as address:
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.putrequest("GET", "/api/record?index=0", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == status
        assert (b"chat/0" in answer.read()) == (status == 200)


def test_only_get_is_served_and_only_known_paths(made: Path) -> None:
    with shown(Converted(str(made))) as address:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            request = urllib.request.Request(f"{address}/api/set", b"{}", method=method)
            with pytest.raises(urllib.error.HTTPError, match="501"):
                urllib.request.urlopen(request)
        for path in (
            "/../server.py",
            "/server.py",
            "/%2e%2e/server.py",
            "//etc/passwd",
            "/api",
            "/api/picture/../../x",
        ):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", path)
            assert connection.getresponse().status == 404


def test_it_listens_on_this_machine_alone(made: Path) -> None:
    server = make_server(Viewer(Records([Converted(str(made))]), LeftOuts([])))
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=rf"port {server.server_port} of 127\.0\.0\.1 cannot be used: .*--port 0"):
        make_server(Viewer(Records([]), LeftOuts([])), server.server_port)
    server.server_close()
    with pytest.raises(ValueError, match="--port must be 0 or from 1024 to 65535, not 80"):
        make_server(Viewer(Records([]), LeftOuts([])), 80)


@pytest.mark.parametrize(
    ("path", "query", "status", "message"),
    [
        ("/api/record", {"index": 8}, 400, "index is a whole number from 0 to 7, not '8'"),
        ("/api/record", {}, 400, "index is a whole number from 0 to 7, not ''"),
        ("/api/record", {"index": "٣"}, 400, "index is a whole number"),
        ("/api/record", {"index": "--"}, 400, "index is a whole number"),
        ("/api/find", {"min__words": "many"}, 400, "min.words is a number, not 'many'"),
        ("/api/find", {"min__beauty": 1}, 400, "there is no measure 'beauty'"),
        ("/api/find", {"source": "other"}, 400, "there is no source 'other': there are set"),
        ("/api/find", {"limit": 10_000}, 400, "limit is a whole number from 1 to 200"),
        ("/api/picture", {"index": 0, "number": 4}, 404, "there is none of this number"),
        ("/api/picture", {"index": 0, "side": 9_999}, 400, "side is a whole number from 16 to 1024"),
        ("/api/seen", {"index": 0}, 404, "there is none of this number"),
    ],
)  # fmt: skip
def test_wrong_questions_are_refused_in_words(path: str, query: Any, status: int, message: str, made: Path) -> None:
    with shown(Converted(str(made))) as address:
        found = refused(address, path, **query)
    assert (found[0], message in found[1]) == (status, True), found


# ----- what is shown -----


def test_a_record_with_its_pictures_and_what_is_supervised(made: Path) -> None:
    with shown(Converted(str(made))) as address:
        told = ask(address, "/api/set")
        assert (told["records"], told["measures"]) == (8, ["words", "pictures"])
        record = ask(address, "/api/record", index=3)
        assert (record["id"], record["urls"], record["problem"]) == ("chat/3", [URL], None)
        assert "samples" not in record
        user, assistant = record["messages"]
        assert user["parts"][0] == {"picture": 0, "name": None, "size": [43, 30], "moment": None}
        assert user["parts"][1] == {"text": f"What is 3? {EVIL}", "supervised": False}
        assert [part["supervised"] for part in assistant["parts"]] == [False, True]
        answer = urllib.request.urlopen(f"{address}/api/picture?index=3&number=0")
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.read() == (made.parent / "3.png").read_bytes()
        small = urllib.request.urlopen(f"{address}/api/picture?index=3&number=0&side=20")
        assert PILImage.open(io.BytesIO(small.read())).size == (20, 14)


def test_a_picture_that_browsers_do_not_show_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    PILImage.new("RGB", (9, 7), "red").save(tmp_path / "p" / "a.tiff")
    with shown(open_source(str(tmp_path / "p"))) as address:
        answer = urllib.request.urlopen(f"{address}/api/picture?index=0")
        assert answer.headers["Content-Type"] == "image/png"
        assert PILImage.open(io.BytesIO(answer.read())).getpixel((0, 0)) == (255, 0, 0)


def test_files_as_they_are_with_what_cannot_be_used(chats: Path) -> None:
    with shown(ChatJsonl(str(chats))) as address:
        broken = ask(address, "/api/record", index=9)
        assert broken["problem"]["reason"] == "malformed"
        assert "messages" not in broken
        assert refused(address, "/api/picture", index=8)[1].startswith("missing_image")
        assert indices(ask(address, "/api/find", reason="malformed")) == [9]
        assert indices(ask(address, "/api/find", reason="-")) == list(range(9))
        found = ask(address, "/api/find", reason="*")
        assert (indices(found), found["reasons"], found["matches"][0]["id"]) == ([9], ["malformed"], "9")


def test_a_record_as_the_model_gets_it(chats: Path, encode: SampleEncoder) -> None:
    source = ChatJsonl(str(chats))
    (sample,) = encode.sequences(source.record(2), source.image_folder)
    with shown(source, encode=encode) as address:
        assert ask(address, "/api/set")["measures"] == ["words", "pictures", "positions"]
        record = ask(address, "/api/record", index=2)
        (sequence,) = record["samples"]["sequences"]
        assert (sequence["positions"], record["facts"]["positions"]) == (len(sample), len(sample))
        pieces = sequence["pieces"]
        (picture,) = [piece for piece in pieces if "picture" in piece]
        assert (picture["start"], picture["tokens"]) == (sample.image_starts[0], sample.grids[0].num_tokens)
        taught = [piece["text"] for piece in pieces if piece.get("supervised")]
        assert taught == ["number 2 so so<|im_end|>"]
        assert sum(piece["tokens"] for piece in pieces) == len(sample)
        assert sequence["supervised"] == sum(label != IGNORE for label in sample.labels)
        seen = urllib.request.urlopen(f"{address}/api/seen?index=2&sequence=0&number=0").read()
        pixels = np.asarray(PILImage.open(io.BytesIO(seen)))
        assert np.array_equal(pixels, sample.images[0].permute(1, 2, 0).numpy())
        # The last but one has no picture, so the model gets nothing of it.
        assert ask(address, "/api/record", index=8)["samples"]["problem"]["reason"] == "missing_image"
        assert indices(ask(address, "/api/find", reason="missing_image")) == [8]
        longest = ask(address, "/api/record", index=7)["facts"]["positions"]
        assert longest > len(sample)
        assert indices(ask(address, "/api/find", min__positions=longest)) == [7]


# ----- search -----


def test_search_filters_and_steps(made: Path, chats: Path) -> None:
    with shown(Converted(str(made), name="set"), ChatJsonl(str(chats))) as address:
        find_ = lambda **query: indices(ask(address, "/api/find", **query))  # noqa: E731
        assert find_(text="NUMBER 4") == [4, 12]
        assert find_(text="chat/5") == [5, 13]
        assert find_(text="NUMBER 4", source="chats") == [12]
        assert find_(text="NUMBER 4", start=5) == [12]
        assert find_(text="number", limit=1, start=6, backwards=1) == [6]
        assert find_(text="number 4", limit=1, start=11, backwards=1) == [4]
        assert find_(text=URL) == [3, 11]
        words = ask(address, "/api/record", index=4)["facts"]["words"]
        assert find_(min__words=words, max__words=words) == [4, 12]
        assert find_(max__words=words, text="number 4") == [4, 12]
        assert find_(min__pictures=2) == []
        answer = ask(address, "/api/find", text="number", limit=3)
        assert (indices(answer), answer["next"]) == ([0, 1, 2], 3)
        snippet = answer["matches"][0]["snippet"]
        assert "<b id=evil> I see number 0" in snippet
        assert snippet.startswith("…")
        assert indices(ask(address, "/api/random", text="number 4", source="set")) == [4]
        assert indices(ask(address, "/api/random", text="nowhere")) == []
        assert {indices(ask(address, "/api/random"))[0] for _ in range(60)} > {0, 17}


def test_counts_are_kept_and_a_scan_of_them_reads_no_record() -> None:
    source = Count("n", 3 * WINDOW)
    records = Records([source])
    read: list[int] = []
    source._on_record = read.append
    found = find(records, Query(text="n 12345"), 0, 1, seconds=60)
    assert [match.index for match in found.matches] == [12345]
    assert read == list(range(12346))
    for index in range(2 * WINDOW - 10, 2 * WINDOW + 10):
        records.look(index)
    read.clear()
    records.known[:] = True  # so that what was not looked at has no word, and is not read
    query = Query(between={"words": (1, None)})
    found = find(records, query, 12346, 15)
    assert [match.index for match in found.matches] == list(range(2 * WINDOW - 10, 2 * WINDOW + 5))
    assert len(read) == 15
    assert found.next == 2 * WINDOW + 5
    back = find(records, query, 3 * WINDOW, 3, backwards=True)
    assert [match.index for match in back.matches] == [2 * WINDOW + 9, 2 * WINDOW + 8, 2 * WINDOW + 7]


def test_a_scan_stops_in_time_and_goes_on_where_it_stopped() -> None:
    records = Records([Count("n", 1_000_000)])
    start, steps = 0, 0
    while start is not None and start < 300:
        found = find(records, Query(text="n 250."), start, 5, seconds=0.0)
        assert found.next == start + 1
        start, steps = found.next, steps + 1
    assert steps == 300
    assert draw(records, Query(text="n 999999"), seconds=0.05).next is not None


def test_what_was_left_out_is_listed_by_reason(made: Path, tmp_path: Path) -> None:
    rows = {
        "source": ["a"], "id": ["chat/1"], "step": ["2 Size"], "reason": ["too_small"], "value": [12.0],
        "detail": ["side"],
    }  # fmt: skip
    pq.write_table(pa.table(rows), tmp_path / "dropped.parquet")
    assert beside(str(made)) == [made / "bad_samples.jsonl"]
    with shown(Converted(str(made)), left_out=[*beside(str(made)), tmp_path / "dropped.parquet"]) as address:
        assert ask(address, "/api/set")["left_out"] == {"missing_image": 1, "malformed": 1, "2 Size: too_small": 1}
        (entry,) = ask(address, "/api/left_out", reason="2 Size: too_small")["entries"]
        assert entry == {"id": "chat/1", "source": "a", "reason": "2 Size: too_small", "detail": "12 · side"}
        (entry,) = ask(address, "/api/left_out", text="8.PNG")["entries"]
        assert entry["reason"] == "missing_image"
    (tmp_path / "x.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, entry 1: expected an object with id, source, reason, detail"):
        LeftOuts([tmp_path / "x.jsonl"])
    (tmp_path / "x.parquet").write_text("none")
    with pytest.raises(ValueError, match=r"x\.parquet does not say what was dropped"):
        LeftOuts([tmp_path / "x.parquet"])


def test_clusters_and_similarities_of_a_curation(made: Path, tmp_path: Path) -> None:
    group = tmp_path / "measures" / "a" / "b"
    group.mkdir(parents=True)
    ids = [f"chat/{index}" for index in range(8)]
    rows = {
        "source": pa.array([0] * 8 + [0, 1], pa.int32()),
        "id": [*ids, "x", "x"],
        "pictures": pa.array([1] * 9 + [2], pa.int32()),
    }
    pq.write_table(pa.table(rows), group / "records.parquet")
    pq.write_table(pa.table({"cluster": list(range(11)), "vector": [[0.0]] * 11}), group / "Cluster-1.parquet")
    pq.write_table(pa.table({"similarity": np.arange(10) / 10}), group / "Similarity-2.parquet")
    with pytest.raises(ValueError, match="holds no measures of lit-vlm data curate"):
        read_measures(tmp_path / "measures")
    (group / "measures.json").write_text("{}")
    measures = read_measures(tmp_path / "measures")
    assert (measures.names, len(measures)) == (["cluster", "similarity"], 8)
    assert measures.row_of("x") == measures.NONE  # two sources have it
    assert measures.row_of("laion/chat/3") == measures.row_of("chat/3")
    with shown(Converted(str(made)), measures=measures) as address:
        assert ask(address, "/api/set")["measures"] == ["words", "pictures", "cluster", "similarity"]
        facts = ask(address, "/api/record", index=6)["facts"]
        assert (facts["cluster"], facts["similarity"]) == (6, 0.6)
        assert indices(ask(address, "/api/find", min__cluster=3, max__cluster=3)) == [3]
        assert indices(ask(address, "/api/find", min__similarity=0.55)) == [6, 7]
    (group / "Other-3.parquet").write_text("none")
    with pytest.raises(ValueError, match=r"Other-3\.parquet holds no measures"):
        read_measures(tmp_path / "measures")


# ----- the command -----


def test_the_command_prints_its_address_and_ends_quietly(made: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_vlm", "data", "view", made.name, "chats.jsonl", "--port", "0"],
        cwd=made.parent, env=environment(made.parent), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    line = process.stdout.readline()
    address = line.partition("open ")[2].partition("/ ;")[0]
    assert line.startswith("18 records of set, chats: open http://127.0.0.1:")
    assert ask(address, "/api/set")["left_out"] == {"missing_image": 1, "malformed": 1}
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "loading libraries ...\n")
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no nowhere"),
        (["empty"], "empty holds none of .tar, .parquet, .jsonl or images: name its form with --form"),
        (["set", "--measures", "empty"], "empty holds no measures"),
        (["set", "--left-out", "none.jsonl"], "there is no none.jsonl"),
        (["set", "--port", "80"], "--port must be 0 or from 1024 to 65535, not 80"),
    ],
)
def test_bad_input_is_said_in_one_line(
    words: list[str], message: str, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made.parent)
    Path("empty").mkdir(exist_ok=True)
    with pytest.raises(SystemExit):
        main(["data", "view", *words])
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


@pytest.mark.browser
def test_in_a_browser(made: Path, encode: SampleEncoder, tmp_path: Path) -> None:
    """Records, what is supervised, a search, steps, what was left out, and text that looks like markup."""
    from playwright.sync_api import expect, sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "no Chromium is installed"
    source, left_out = Converted(str(made)), beside(str(made))
    with shown(source, encode=encode, left_out=left_out) as address, sync_playwright() as started:
        page = started.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        matches = page.locator("#matches li")
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}"))
        page.goto(f"{address}/#index=3")
        page.wait_for_selector(".sequence figure img")
        expect(matches).to_have_count(8)
        expect(page.locator("figure img")).to_have_count(2)
        for image in page.locator("figure img").all():
            assert image.evaluate("async (one) => { await one.decode(); return one.naturalWidth }") > 30
        assert page.locator("h1").inner_text() == "chat/3"
        assert page.locator("main .message .taught").all_inner_texts() == ["number 3 so so so"]
        assert page.locator("main .sequence .taught").all_inner_texts() == ["number 3 so so so<|im_end|>"]
        assert EVIL in page.locator("main .message").first.inner_text()
        assert page.locator("#evil").count() == 0
        assert page.locator("main a[target=_blank]").get_attribute("href") == URL
        page.keyboard.press("ArrowRight")
        expect(page.locator("h1")).to_have_text("chat/4")
        assert "index=4" in page.url
        page.fill("#text", "number 6")
        page.keyboard.press("Enter")
        expect(matches).to_have_count(1)
        page.click("#random")
        expect(page.locator("h1")).to_have_text("chat/6")
        page.click("#clear")
        expect(matches).to_have_count(8)
        page.click("#previous")
        expect(page.locator("h1")).to_have_text("chat/5")
        page.fill("[name='min.words']", "12")
        page.click("#search")
        expect(matches).not_to_have_count(8)
        page.click("#tab-left-out")
        expect(matches).to_have_count(2)
        page.select_option("#why", "malformed")
        expect(matches).to_have_count(1)
        page.click("#matches li")
        expect(page.locator("#progress")).to_contain_text("is not in the set")
        page.goto(f"{address}/#index=2&text=number+2")
        page.reload()
        expect(matches).to_have_count(1)
        assert page.locator("h1").inner_text() == "chat/2"
        assert problems == []
