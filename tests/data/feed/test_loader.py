"""The loader: the plan of batches, counts of a step, exact resume, and bad samples."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from lit_vlm.core.batch import DENIED, BadSample, Batch, Counts, Window
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.loader import BadSamples, Loader, Placed, SourceDataset
from lit_vlm.data.feed.plan import BatchPlan, Place
from lit_vlm.data.sample.collate import make_rows
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.templates import ChatML
from lit_vlm.data.sample.transforms import Native
from lit_vlm.data.sources import ChatJsonl
from tests.data.made import Count, plan_over


@dataclass
class Numbers(Dataset[Placed]):
    """Samples 0, 1, ... of growing length; those in `bad` cannot be used, those in `cut` were truncated."""

    length: int
    bad: frozenset[int] = frozenset()
    reason: str = "missing_image"
    cut: frozenset[int] = field(default_factory=frozenset)

    def __getitem__(self, place: Place) -> Placed:
        index = place.sample
        if index in self.bad:
            return Placed(place.row, BadSample(str(index), "numbers", self.reason, f"{index}.png"))
        ids = [1 + index % 9] * (2 + index % 5)
        note = BadSample(str(index), "numbers", "truncated", "cut", dropped=False) if index in self.cut else None
        return Placed(place.row, [Sample(str(index), "numbers", ids, list(ids), note=note)])


def make_plan(
    length: int, batch_size: int, rank: int = 0, world: int = 1, shuffle: bool = True, seed: int = 5
) -> BatchPlan:
    return plan_over([Count("numbers", length)], GlobalBatch(batch_size, world), rank, shuffle, seed=seed)


def make(
    dataset: Numbers,
    batch_size: int = 2,
    workers: int = 0,
    window: int = 1,
    world: int = 1,
    rank: int = 0,
    shuffle: bool = True,
    seed: int = 5,
    bad_samples: BadSamples = BadSamples(),  # noqa: B008 - frozen
    log: Path | None = None,
) -> Loader:
    plan = make_plan(dataset.length, batch_size, rank, world, shuffle, seed)
    return Loader(dataset, plan, make_rows, workers, window, bad_samples, log, pin_memory=False)


def ids(batches: Iterable[Batch]) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in batches]


def indices(plan: BatchPlan) -> list[list[int]]:
    return [[place.sample for place in batch] for batch in plan]


# ----- the plan -----


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 5, 12, 13, 24, 25])
def test_every_sample_comes_once_per_epoch(length: int, world: int, shuffle: bool) -> None:
    plans = [make_plan(length, 2, rank, world, shuffle, seed=1) for rank in range(world)]
    batches = [indices(plan) for plan in plans]
    assert {len(own) for own in batches} == {len(plans[0])}  # every rank takes every step
    assert sorted(index for own in batches for batch in own for index in batch) == list(range(length))
    assert all(len(batch) <= 2 for own in batches for batch in own)


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("length", [5, 24, 25, 31])
def test_global_batches_do_not_depend_on_the_number_of_ranks(length: int, world: int) -> None:
    alone = indices(make_plan(length, 6, seed=3))
    shares = [indices(make_plan(length, 6 // world, rank, world, seed=3)) for rank in range(world)]
    together = [[index for batch in step for index in batch] for step in zip(*shares, strict=True)]
    assert together == alone


def test_epochs_differ_and_seeds_repeat() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        plan = make_plan(40, 4, seed=seed)
        plan.set_epoch(epoch)
        return list(plan)

    assert order(0, 0) == order(0, 0)
    assert order(0, 3) == order(0, 3)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_without_shuffle_the_order_is_that_of_the_sources() -> None:
    plan = make_plan(5, 2, shuffle=False)
    plan.set_epoch(4)
    assert indices(plan) == [[0, 1], [2, 3], [4]]


def test_lightning_finds_set_epoch_behind_the_sampler() -> None:
    loader = make(Numbers(8))
    loader.batch_sampler.sampler.set_epoch(3)
    assert loader.state_dict()["epoch"] == 3


# ----- the loader -----


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_every_batch_knows_the_counts_of_its_step(window: int) -> None:
    batches = list(make(Numbers(19), window=window))
    assert len(batches) == 10
    for first in range(0, 10, window):
        step = batches[first : first + window]
        expected = sum((batch.counts for batch in step), Counts())
        assert all(batch.window == Window(expected) for batch in step)
    assert sum((batch.counts for batch in batches), Counts()).samples == 19


def test_counts_that_heads_bring_are_those_of_the_whole_step() -> None:
    loader = make(Numbers(19), window=3)
    loader.own_counts = {"own": lambda batch: 0.5 * batch.counts.samples}
    assert [batch.window.own["own"] for batch in loader if batch.window] == [3.0] * 9 + [0.5]


def test_a_rank_without_samples_still_gets_a_batch() -> None:
    last = list(make(Numbers(9), batch_size=2, world=2, rank=1))[-1]
    assert last.counts.samples == 0
    assert last.input_ids.shape == (1, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 4, 9, 10])
def test_resume_goes_on_with_exactly_the_rest(done: int, workers: int) -> None:
    def fresh() -> Loader:
        loader = make(Numbers(19), workers=workers)
        loader.batch_sampler.set_epoch(2)
        return loader

    whole = ids(fresh())
    first = fresh()
    iterator = iter(first)
    taken = [next(iterator) for _ in range(done)]
    state = json.loads(json.dumps(first.state_dict()))
    second = make(Numbers(19), workers=workers)
    second.load_state_dict(state)
    assert second.state_dict()["epoch"] == 2
    rest = ids(second)
    assert ids(taken) == whole[:done]
    assert rest == (whole[done:] if done < len(whole) else whole)  # a finished epoch is followed by a whole one


def test_the_epoch_after_a_resumed_one_is_whole() -> None:
    loader = make(Numbers(19))
    loader.load_state_dict(make(Numbers(19)).state_dict() | {"batches": 7})
    assert len(ids(loader)) == 3
    loader.batch_sampler.set_epoch(1)
    again = make(Numbers(19))
    again.batch_sampler.set_epoch(1)
    assert ids(loader) == ids(again)
    assert loader.state_dict()["batches"] == 10


def test_state_before_the_first_batch_of_a_resumed_loader_is_the_same_state() -> None:
    state = make(Numbers(19)).state_dict() | {"batches": 7}
    loader = make(Numbers(19))
    loader.load_state_dict(state)
    assert loader.state_dict() == state


def test_resume_on_another_number_of_ranks() -> None:
    whole = ids(make(Numbers(24), batch_size=4))
    state = make(Numbers(24), batch_size=4).state_dict() | {"batches": 2}
    shares = []
    for rank in range(2):
        loader = make(Numbers(24), batch_size=2, world=2, rank=rank)
        loader.load_state_dict(state)
        shares.append(ids(loader))
    assert [a + b for a, b in zip(*shares, strict=True)] == whole[2:]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (make(Numbers(20)), "samples: 19 then, 20 now"),
        (make(Numbers(19), batch_size=3), "rows per micro-batch on all devices: 2 then, 3 now"),
        (make(Numbers(19), seed=6), "seed: 5 then, 6 now"),
        (make(Numbers(19), world=2), "rows per micro-batch on all devices: 2 then, 4 now"),
    ],
    ids=["samples", "batch size", "seed", "ranks"],
)
def test_a_changed_plan_refuses_to_resume(other: Loader, named: str) -> None:
    with pytest.raises(ValueError, match=f"its order of samples would be another.*{named}.*start_from"):
        other.load_state_dict(make(Numbers(19)).state_dict())


def test_sources_count_by_their_content_whatever_they_are_called() -> None:
    def loader(*sources: Count) -> Loader:
        return Loader(Numbers(20), plan_over(sources, GlobalBatch(2, 1)), make_rows, 0, 1, BadSamples(), None, False)

    saved = json.loads(json.dumps(loader(Count("val", 10, "x"), Count("val", 10, "y")).state_dict()))
    assert [one for one, _ in saved["plan"]["sources"]] == ["val", "val"]
    renamed = loader(Count("mnt-docvqa-val", 10, "x"), Count("chartqa-val", 10, "y"))
    renamed.load_state_dict(saved | {"batches": 3})
    assert renamed.state_dict()["batches"] == 3
    for other in (("x", "z"), ("y", "x")):
        changed = loader(*(Count("val", 10, content) for content in other))
        with pytest.raises(ValueError, match=r"its order of samples would be another \(sources: .*'x'.* then, .* now"):
            changed.load_state_dict(saved)


# ----- bad samples -----


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_and_listed(workers: int, tmp_path: Path) -> None:
    log = tmp_path / "run" / "bad_samples.jsonl"
    dataset = Numbers(200, bad=frozenset({3, 50}), cut=frozenset({7}))
    loader = make(dataset, batch_size=10, workers=workers, log=log)
    seen = sorted(int(name) for batch in ids(loader) for name in batch)
    assert seen == [index for index in range(200) if index not in (3, 50)]
    lines = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda line: int(line["id"]))
    assert lines[0] == {"id": "3", "source": "numbers", "reason": "missing_image", "detail": "3.png", "dropped": True}
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("3", "missing_image"),
        ("7", "truncated"),
        ("50", "missing_image"),
    ]
    assert loader.bad == {("numbers", "missing_image"): 2, ("numbers", "truncated"): 1}
    assert loader.seen == 200


def test_fail_stops_at_the_first_and_names_it() -> None:
    loader = make(Numbers(20, bad=frozenset({5})), shuffle=False, bad_samples=BadSamples("fail"))
    with pytest.raises(ValueError, match=r"sample '5' of source 'numbers' cannot be used: missing_image: 5\.png"):
        list(loader)


def test_fail_does_not_stop_at_a_truncated_sample() -> None:
    loader = make(Numbers(20, cut=frozenset({5})), bad_samples=BadSamples("fail", max_share=0.0))
    assert len(list(loader)) == 10


def test_too_many_bad_samples_stop_the_run_with_counts(tmp_path: Path) -> None:
    dataset = Numbers(300, bad=frozenset(range(0, 300, 10)), cut=frozenset({1}))
    loader = make(dataset, batch_size=10, shuffle=False, log=tmp_path / "bad.jsonl")
    message = (
        r"10 of 100 samples cannot be used, more than data\.bad_samples\.max_share 0\.05: "
        r"\{'missing_image in numbers': 10, 'truncated in numbers': 1\}.*90 \(numbers\).*listed in .*bad\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        list(loader)


def test_a_short_run_is_judged_at_its_end() -> None:
    loader = make(Numbers(10, bad=frozenset({9})), shuffle=False)
    with pytest.raises(ValueError, match="1 of 10 samples cannot be used"):
        list(loader)


@pytest.mark.parametrize("bad", [range(10), range(90, 100), range(0, 100, 10)], ids=["first", "last", "spread"])
def test_the_share_counts_wherever_the_bad_samples_stand(bad: range) -> None:
    loader = make(Numbers(100, bad=frozenset(bad)), batch_size=10, shuffle=False)
    with pytest.raises(ValueError, match="10 of 100 samples cannot be used"):
        list(loader)


def test_a_share_below_the_limit_passes() -> None:
    loader = make(Numbers(300, bad=frozenset(range(0, 300, 30))), batch_size=10, shuffle=False)
    assert sum(batch.counts.samples for batch in loader) == 290


def test_denied_samples_are_listed_and_no_fault(tmp_path: Path) -> None:
    denied = Numbers(100, bad=frozenset(range(50)), reason=DENIED)
    loader = make(denied, batch_size=10, bad_samples=BadSamples("fail", max_share=0.0), log=tmp_path / "bad.jsonl")
    assert sum(batch.counts.samples for batch in loader) == 50
    assert loader.bad == {("numbers", "denied"): 50}
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 50
    with pytest.raises(ValueError, match="all of 100 samples are denied"):
        list(make(replace(denied, bad=frozenset(range(100))), batch_size=10))


# ----- several sources -----


def test_sources_are_read_one_after_the_other(tmp_path: Path, bytes_spec: InputSpec) -> None:
    def source(name: str, *lines: str) -> ChatJsonl:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return ChatJsonl(str(tmp_path / f"{name}.jsonl"))

    def line(name: str) -> str:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]
        return json.dumps({"id": name, "messages": turns})

    sources = [source("one", line("a"), line("b")), source("none"), source("two", line("c"), "{", line("d"))]
    dataset = SourceDataset(sources, SampleEncoder(bytes_spec, ChatML(), Native(64), 100))
    found = [dataset[Place(0, index)].items for index in range(len(dataset))]
    items = [one if isinstance(one, BadSample) else one[0] for one in found]
    assert [(item.source, item.id) for item in items] == [
        ("one", "a"),
        ("one", "b"),
        ("two", "c"),
        ("two", "1"),
        ("two", "d"),
    ]
    assert isinstance(items[3], BadSample)
    assert items[3].reason == "malformed"


def test_a_missing_image_is_a_bad_sample_with_the_id_of_its_record(
    tmp_path: Path, bytes_spec: InputSpec, png: Callable[..., bytes]
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    lines = []
    for name in ("a", "b"):
        content = [{"type": "image", "image": f"{name}.png"}, {"type": "text", "text": "?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
        lines.append(json.dumps({"id": name, "messages": turns}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    encode = SampleEncoder(bytes_spec, ChatML(), Native(64), 100)
    dataset = SourceDataset([ChatJsonl(str(tmp_path / "chat.jsonl"))], encode)
    (_, read), (_, bad) = dataset[Place(0, 0)], dataset[Place(1, 1)]
    assert isinstance(read, list)
    (good,) = read
    assert len(good.images) == 1
    assert isinstance(bad, BadSample)
    assert bad[:3] == ("b", "chat", "missing_image")


def test_a_list_of_bad_samples_that_cannot_be_written_is_warned_of_once(tmp_path: Path, caplog) -> None:
    (tmp_path / "run").write_text("in the place of a folder")
    loader = make(Numbers(40, bad=frozenset(range(0, 40, 4))), log=tmp_path / "run" / "bad_samples.jsonl",
                  bad_samples=BadSamples(max_share=1.0))  # fmt: skip
    assert sum(len(names) for names in ids(loader)) == 30
    (record,) = [record for record in caplog.records if "cannot be written" in record.getMessage()]
    assert "bad_samples.jsonl cannot be written, and samples are missing in it: " in record.getMessage()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
def test_workers_ignore_signals_that_ask_a_run_to_leave_but_for_those_of_their_parent() -> None:
    loader = make(Numbers(40), workers=2)
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker, which then both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    stranger = "import os, signal, sys; [os.kill(int(pid), getattr(signal, sys.argv[1])) for pid in sys.argv[2:]]"
    for name in ("SIGUSR1", "SIGUSR2", "SIGTERM"):
        subprocess.run([sys.executable, "-c", stranger, name, *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == len(loader) - 2
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
        worker.join(10)
    assert [worker.is_alive() for worker in workers] == [False] * len(workers)
