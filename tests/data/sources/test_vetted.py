"""Deny-lists and provenance: what is left out, what is listed, and what is carried on."""

from __future__ import annotations

import hashlib
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_vlm.commands.cli import main
from lit_vlm.data import (
    Captions,
    ChatJsonl,
    Converted,
    Grouped,
    Mmc4,
    Parquet,
    RandomWords,
    Texts,
    Unpaired,
    Vetted,
    WebDataset,
)
from lit_vlm.data.curation.selected import Selected
from lit_vlm.data.feed.split import split
from lit_vlm.data.records import RecordError
from lit_vlm.data.sets.convert import TooManyBad, convert
from lit_vlm.data.sets.engine import paths_of
from lit_vlm.data.sets.forms import open_source
from lit_vlm.data.sources.deny import DenyList
from lit_vlm.data.sources.provenance import Provenance
from tests.data.made_videos import make_video
from tests.data.sets.test_convert import add, picture, write_flan, write_llava
from tests.data.sources.test_videos import rows_of, turns

URL = "https://pictures.example.org/a%20b.jpg?size=2"
PAGE = "http://pages.example.org/"


def listed(folder: Path, *lines: str) -> str:
    (folder / "deny.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "deny.txt")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_lines_are_addresses_and_hashes_in_any_order(tmp_path: Path) -> None:
    lines = ["# opted out", "", URL, sha256(b"a").upper(), sha256(b"b")]
    found = DenyList(listed(tmp_path, *lines))
    assert found.has_hash(hashlib.sha256(b"a").digest())
    assert not found.has_hash(hashlib.sha256(b"c").digest())
    assert found.has_address("HTTPS://Pictures.example.org/a%20b.jpg?size=2#part")
    assert not found.has_address(URL.replace("a%20b", "A%20B"))
    assert not found.has_address("https://[broken/")
    before = found.fingerprint()
    assert DenyList(listed(tmp_path, *reversed(lines))).fingerprint() == before
    assert DenyList(listed(tmp_path, *lines[:-1])).fingerprint() != before


def test_an_empty_list_denies_nothing(tmp_path: Path) -> None:
    found = DenyList(listed(tmp_path, "# none yet"))
    assert (found.has_hashes, found.has_addresses, found.has_address(URL)) == (False, False, False)


@pytest.mark.parametrize("line", ["cat", sha256(b"a")[:-1], "https://", "md5:" + "0" * 32, "two words://x y", "\0"])
def test_another_line_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"deny\.txt, line 3: .* is neither an address"):
        DenyList(listed(tmp_path, URL, "", line))
    with pytest.raises(ValueError, match="there is no deny-list"):
        DenyList(str(tmp_path / "none.txt"))


def test_a_line_takes_sixteen_bytes_in_each_worker(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    digests = [rng.bytes(32) for _ in range(20_000)]
    found = DenyList(listed(tmp_path, *(digest.hex() for digest in digests)))
    assert len(pickle.dumps(found)) < 17 * len(digests)
    assert all(found.has_hash(digest) for digest in digests[:50])


# ----- what readers know of addresses -----


def test_readers_keep_the_addresses_of_their_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture())
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

    def rows(name: str, *values: object) -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, values)))
        return str(tmp_path / name)

    (tmp_path / "t.csv").write_text(f"image,caption,URL\na.jpg,a cat,{URL}\n")
    pq.write_table(pa.table({"image": [picture()], "caption": ["a cat"], "url": [URL]}), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("a", "b"):
            add(tar, f"{name}.jpg", picture())
            add(tar, f"{name}.txt", b"a cat")
        add(tar, "a.json", json.dumps({"url": URL, "caption": "another"}).encode())
        add(tar, "b.json", b"{broken")
    image = {"image_name": "a.jpg", "matched_text_index": 0, "raw_url": URL}
    document = {"text_list": ["One."], "image_info": [image], "url": PAGE}
    captions, tars = Captions(str(tmp_path / "t.csv")), WebDataset(str(tmp_path / "t.tar"))
    assert captions.record(0).urls == Parquet(str(tmp_path / "t.parquet")).record(0).urls == (URL,)
    assert [tars.record(index).urls for index in range(2)] == [(URL,), ()]
    assert tars.record(0).messages[1].text == "a cat"
    assert ChatJsonl(rows("c.jsonl", {"messages": chat, "url": URL})).record(0).urls == (URL,)
    assert Texts(rows("f.jsonl", {"text": "x", "url": PAGE})).record(0).urls == (PAGE,)
    assert Texts(rows("g.jsonl", {"text": "x", "url": "no address"})).record(0).urls == ()
    assert Mmc4(rows("m.jsonl", document)).record(0).urls == (PAGE, URL)
    assert Mmc4(rows("m.jsonl", document), items="pairs").record(0).urls == (PAGE, URL)
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    llava = rows("l.jsonl", {"image": "a.jpg", "url": URL, "conversations": talk})
    assert open_source(llava).record(0).urls == (URL,)
    assert Grouped(tars, 2).record(0).urls == (URL,)
    assert Unpaired(captions, Texts(str(tmp_path / "f.jsonl"))).record(0).urls == (URL, PAGE)
    convert(tars, tmp_path / "set")
    made = Converted(str(tmp_path / "set"), name="t")
    assert [made.record(index).urls for index in range(2)] == [made.outline(index).urls for index in range(2)]
    assert made.record(0).urls == (URL,)


# ----- what is denied -----


def test_denied_records_are_left_out_of_a_conversion_and_listed(tmp_path: Path) -> None:
    source = write_llava(tmp_path)
    deny = listed(tmp_path, sha256(picture(1)), sha256(picture(4)), sha256(b"another"))
    info = convert(Vetted(open_source(str(source)), deny), tmp_path / "out", max_bad_share=0.0)
    assert (info.records, info.bad) == (5, {"denied": 2})
    lines = (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()
    assert [(one["id"], one["reason"]) for one in map(json.loads, lines)] == [("1", "denied"), ("4", "denied")]
    assert "record l1: " in lines[0]
    assert sha256(picture(1)) in lines[0]
    assert "deny.txt" in lines[0]
    made = Converted(str(tmp_path / "out"))
    assert [made.record(index).id for index in range(5)] == ["l0", "l2", "l3", "l5", "text"]


def test_another_list_is_another_set(tmp_path: Path) -> None:
    source = open_source(str(write_llava(tmp_path)))
    first = Vetted(source, listed(tmp_path, sha256(picture(1))))
    convert(first, tmp_path / "out")
    second = Vetted(source, listed(tmp_path, sha256(picture(2))))
    assert len({source.fingerprint(), first.fingerprint(), second.fingerprint()}) == 3
    with pytest.raises(ValueError, match="the result of something else"):
        convert(second, tmp_path / "out")


def test_a_source_of_which_all_is_denied_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture())
    with pytest.raises(TooManyBad, match=r"none of the 1 records can be used \(denied 1\)"):
        convert(Vetted(open_source(str(folder)), listed(tmp_path, sha256(picture()))), tmp_path / "out")


def test_a_video_is_denied_by_its_file(tmp_path: Path) -> None:
    video = make_video(tmp_path / "a.mp4")
    source = open_source(rows_of(tmp_path, [{"video": "a.mp4", "conversations": turns()}] * 2))
    with pytest.raises(RecordError, match=r"denied: record 0: a\.mp4, SHA-256"):
        Vetted(source, listed(tmp_path, sha256(video.read_bytes()))).record(0)
    assert Vetted(source, listed(tmp_path, sha256(b""))).record(0).images == source.record(0).images


def test_a_list_of_addresses_is_said_to_deny_nothing_where_records_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(str(write_llava(tmp_path)))
    Vetted(source, listed(tmp_path, sha256(b"a"), URL))
    assert not caplog.records
    Vetted(source, listed(tmp_path, URL))
    assert "the first records of the source 'mix' have none" in caplog.text


# ----- where data come from -----


def test_the_commands_keep_and_show_where_a_set_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, words = str(write_llava(tmp_path)), ["--workers", "0"]
    deny = listed(tmp_path, sha256(picture(1)))
    given = ["--licence", "CC-BY-4.0", "--origin", "https://example.org/mix", "--deny", deny]
    main(["data", "convert", source, "out", *words, *given])
    before = Converted("out").info
    main(["data", "convert", source, "out", *words, "--deny", deny, "--revision", "v2", "--licence", "CC0-1.0"])
    after = Converted("out").info
    assert before.provenance == Provenance("CC-BY-4.0", "https://example.org/mix")
    assert after.provenance == Provenance("CC0-1.0", "https://example.org/mix", "v2")
    assert after.fingerprint == before.fingerprint
    capsys.readouterr()
    main(["data", "stats", "out", *words])
    told = capsys.readouterr().out
    assert "licence: CC0-1.0\norigin: https://example.org/mix\nrevision: v2\nleft out: denied 1\n" in told
    main(["data", "convert", "out", "again", *words, "--deny", listed(tmp_path, sha256(picture(4)))])
    again = Converted("again")
    assert (again.info.records, again.info.bad, again.provenance) == (
        after.records - 1,
        {"denied": 1},
        after.provenance,
    )
    assert again.record(0) == replace(Converted("out").record(0), source="again")
    with pytest.raises(SystemExit):
        main(["data", "convert", source, "other", *words, "--deny", listed(tmp_path, "nothing")])
    assert "deny.txt, line 1: 'nothing' is neither an address" in capsys.readouterr().err


def test_sets_from_before_say_nothing_of_it(tmp_path: Path) -> None:
    convert(open_source(str(write_llava(tmp_path))), tmp_path / "out")
    file = tmp_path / "out" / "lit_vlm.json"
    info = json.loads(file.read_text())
    del info["provenance"]
    file.write_text(json.dumps(info))
    assert Converted(str(tmp_path / "out")).provenance == Provenance()


def test_sources_of_sources_know_where_these_come_from(tmp_path: Path) -> None:
    pictures = Vetted(open_source(str(write_llava(tmp_path))), licence="MIT", origin="https://example.org/a")
    texts = Vetted(pictures, licence="CC0-1.0", name="texts")
    assert (texts.name, texts.record(0).source) == ("texts", "texts")
    assert texts.provenance == Provenance("CC0-1.0", "https://example.org/a")
    assert Grouped(pictures, 2).provenance == pictures.provenance
    assert Unpaired(pictures, texts).provenance == Provenance("MIT; CC0-1.0", "https://example.org/a")
    assert {part.provenance for part in split(pictures, 0.5)} == {pictures.provenance}
    assert pictures.fingerprint() == pictures.source.fingerprint()


def test_workers_must_see_what_sources_of_sources_read(tmp_path: Path) -> None:
    pictures, texts = open_source(str(write_llava(tmp_path))), Texts(str(write_flan(tmp_path)))
    own, both = paths_of(pictures), paths_of(pictures, texts)
    assert own[0] == str(pictures.path)
    assert set(own) < set(both)
    assert paths_of(Vetted(pictures)) == paths_of(Grouped(pictures, 2)) == paths_of(split(pictures, 0.5)[0]) == own
    for made in (Unpaired(pictures, texts), Selected((pictures, texts), np.arange(3), "some")):
        assert paths_of(made) == both
    convert(texts, tmp_path / "set")
    assert paths_of(Converted(str(tmp_path / "set")), RandomWords("bytes")) == [str(tmp_path / "set")]
