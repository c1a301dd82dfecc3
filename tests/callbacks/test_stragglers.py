"""A process that stays slower than the others is named, with what takes its time; others are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from callbacks import Stragglers
from callbacks.stragglers import Episodes, Slowest, Spans
from tests.callbacks.test_callbacks import data, lit, trainer
from tests.callbacks.test_watchdog import two_ranks

NAMES = ["rank 0 on node a", "rank 1 on node a", "rank 2 on node b"]
EVEN = [[0.0, 0.10], [0.01, 0.10], [0.0, 0.11]]
COMPUTES = [[0.0, 0.10], [0.0, 0.10], [0.0, 0.15]]
READS = [[0.0, 0.10], [0.09, 0.10], [0.01, 0.10]]


def test_the_slowest_is_held_against_the_median_of_the_others() -> None:
    found = Slowest.of(COMPUTES)
    assert (found.rank, found.ratio, found.by_data) == (2, pytest.approx(1.5), False)
    found = Slowest.of(READS)
    assert (found.rank, found.data_share, found.by_data) == (1, pytest.approx(0.09 / 0.19), True)


def test_who_is_slow_for_long_is_named_once_and_again_when_it_is_over() -> None:
    episodes = Episodes(1.2, 3, NAMES)
    rows = [
        EVEN,
        COMPUTES,
        COMPUTES,
        EVEN,
        COMPUTES,
        COMPUTES,
        COMPUTES,
        COMPUTES,
        EVEN,
        COMPUTES,
        EVEN,
        EVEN,
        EVEN,
        EVEN,
    ]
    news = {index: line for index, row in enumerate(rows) if (line := episodes.take(row))}
    assert list(news) == [6, 12]
    assert news[6].startswith("straggler: rank 2 on node b is slow, and the others wait for it: 0.150 s")
    assert "1.5 times the median of the others (0.100 s); it spends more on computation" in news[6]
    assert news[12] == "straggler: rank 2 on node b is no longer slower than the others"


def test_another_one_that_is_slow_is_named_with_what_takes_its_time() -> None:
    episodes = Episodes(1.2, 2, NAMES)
    news = [episodes.take(rows) for rows in (COMPUTES, COMPUTES, READS, READS)]
    assert [line is not None for line in news] == [False, True, False, True]
    assert "rank 1 on node a is slow" in news[3]
    assert "it spends more on data" in news[3]


class Event(torch.cuda.Event):
    """An event of a GPU that comes when it is told to."""

    milliseconds = 0.0
    arrived = False

    def query(self) -> bool:
        return self.arrived

    def elapsed_time(self, end_event: Event) -> float:
        assert self.arrived
        assert end_event.arrived
        return end_event.milliseconds - self.milliseconds

    def synchronize(self) -> None:
        raise AssertionError("nobody waits for a GPU here")


def test_times_of_a_gpu_count_as_soon_as_they_are_known_and_once() -> None:
    events = [Event(enable_timing=True) for _ in range(4)]
    for event, milliseconds in zip(events, (10, 30, 50, 90), strict=True):
        event.milliseconds = milliseconds
    spans = Spans()
    spans.add(events[0], events[1])
    spans.add(events[2], events[3])
    taken = [spans.take()]
    for event in events:
        event.arrived = True
        taken.append(spans.take())
    assert taken == pytest.approx([0, 0, 0.02, 0, 0.04])
    assert spans.take() == 0


@pytest.mark.slow
def test_a_slow_process_is_named_in_a_run_and_a_fast_one_is_not(tmp_path: Path) -> None:
    flags = ["--trainer.max_steps", "16", "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "2",
             "--trainer.limit_val_batches", "0"]  # fmt: skip
    ended = two_ranks(tmp_path, {"rank": "1", "what": "slow"}, *flags)
    assert ended.codes == [0, 0], ended.said
    named = [line for said in ended.said for line in said.splitlines() if line.startswith("straggler")]
    assert len(named) == 1, ended.said
    assert "rank 1 on node n1 is slow" in named[0]
    assert "it spends more on computation" in named[0]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert run.data.metrics["straggler/rank"] == 1
    assert run.data.metrics["straggler/slowest_over_median"] > 1.2
    assert 0 <= run.data.metrics["straggler/data_share"] <= 1


def test_one_process_is_held_against_nobody(tmp_path: Path) -> None:
    run = trainer(tmp_path, Stragglers())
    run.fit(lit(), data())
    assert not [name for name in run.callback_metrics if name.startswith("straggler")]


@pytest.mark.parametrize(
    ("settings", "message"), [({"factor": 1.0}, "factor is above 1"), ({"patience": 0}, "patience is at least 1")]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stragglers(**settings)
