"""Time from operations: by hand arithmetic."""

from __future__ import annotations

import pytest

from lit_vlm.core.devices import CARDS
from lit_vlm.planning.operations import Message, Operation
from lit_vlm.planning.roofline import Assumptions, StepTime, estimate, seconds, travel

A100 = CARDS["a100-80"]
GIB = 2**30
ASSUMED = Assumptions()


def test_a_matrix_product_takes_its_share_of_the_peak() -> None:
    product = Operation("forward", "mm", "bfloat16", flops=312e12, bytes=1e9, calls=1)
    assert seconds(product, A100, Assumptions(matrix=0.5)) == pytest.approx(2.0)


def test_a_product_in_fp32_is_slower_by_the_assumed_factor() -> None:
    product = Operation("forward", "mm", "float32", flops=312e12, bytes=1e9, calls=1)
    assert seconds(product, A100, Assumptions(matrix=0.5, fp32=0.25)) == pytest.approx(8.0)


def test_attention_has_a_share_of_its_own() -> None:
    fused = Operation("forward", "_scaled_dot_product_flash_attention", "bfloat16", flops=312e12, bytes=0, calls=1)
    assert seconds(fused, A100, Assumptions(matrix=1.0, attention=0.25)) == pytest.approx(4.0)


def test_other_operations_take_what_the_memory_allows_and_at_least_a_kernel() -> None:
    large = Operation("forward", "add", "bfloat16", flops=0, bytes=2039e9, calls=1)
    small = Operation("forward", "add", "bfloat16", flops=0, bytes=8, calls=1)
    assert seconds(large, A100, Assumptions(bandwidth=0.5)) == pytest.approx(2.0)
    assert seconds(small, A100, Assumptions(kernel=7e-6)) == pytest.approx(7e-6)


def test_a_product_of_few_rows_is_bound_by_memory() -> None:
    product = Operation("forward", "mm", "bfloat16", flops=2e6, bytes=2039e9 * 0.8, calls=1)
    assert seconds(product, A100, ASSUMED) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "ranks", "nodes", "wanted"),
    [
        ("all_gather", 8, 1, 7 / 8),  # of 300 GB over links of 300 GB/s
        ("reduce_scatter", 8, 1, 7 / 8),
        ("all_reduce", 8, 1, 2 * 7 / 8),
        ("all_gather", 16, 2, 15 / 16 * 300 / 200),  # eight networks of 25 GB/s between machines
        ("all_gather", 1, 1, 0.0),
    ],
)
def test_messages(kind: str, ranks: int, nodes: int, wanted: float) -> None:
    assumed = Assumptions(link=1.0, network=25e9, kernel=0.0)
    message = Message("forward", kind, 300e9, ranks, nodes, calls=1)
    assert travel(message, A100, 8, assumed) == pytest.approx(wanted)


def _step(busy: float, sent: float, work: float = 1.0) -> StepTime:
    assumed = Assumptions(bandwidth=1.0, link=1.0, kernel=0.0)
    done = [Operation(phase, "add", "bfloat16", 0, busy * 2039e9, 1) for phase in ("forward", "backward")]
    messages = [Message(phase, "all_gather", sent * 300e9 * 8 / 7 / 4, 8, 1, 4) for phase in ("forward", "backward")]
    return estimate(done, messages, A100, 8, assumed, work=work)


def test_messages_hide_behind_work_but_for_the_first() -> None:
    time = _step(busy=10.0, sent=4.0)
    assert time.memory == pytest.approx(20.0)
    assert time.messages == pytest.approx(8.0)
    assert time.exposed == pytest.approx(1.0)
    assert time.micro_batch == pytest.approx(21.0)


def test_messages_that_take_longer_than_the_work_are_exposed() -> None:
    time = _step(busy=1.0, sent=4.0)
    assert time.exposed == pytest.approx(1.0 + 2 * 3.0)


def test_the_optimizer_counts_once_per_step() -> None:
    assumed = Assumptions(bandwidth=1.0, kernel=0.0)
    work = [
        Operation("forward", "add", "bfloat16", 0, 2039e9, 1),
        Operation("optimizer", "_fused_adamw_", "float32", 0, 3 * 2039e9, 1),
    ]
    time = estimate(work, [], A100, 8, assumed)
    assert time.step(4) == pytest.approx(4 * 1.0 + 3.0)


def test_more_work_hides_more_messages() -> None:
    time, longer = _step(busy=1.0, sent=4.0), _step(busy=1.0, sent=4.0, work=2.0)
    assert longer.memory == pytest.approx(4.0)
    assert longer.exposed == pytest.approx(time.exposed - 2.0)


def test_a_measured_share_replaces_an_assumed_one() -> None:
    assert ASSUMED.changed({"matrix": 0.4}).matrix == 0.4
    with pytest.raises(ValueError, match="assumptions have no 'speed'; they are matrix, attention"):
        ASSUMED.changed({"speed": 1.0})
