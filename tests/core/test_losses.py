"""The chunked next-token loss against plain cross-entropy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_vlm.core.losses import (
    chunk_rows,
    contrastive_loss,
    cosine_distance,
    next_token_loss,
    smooth_l1_distance,
    token_nll,
)
from tests.runs import run_ranks

ROWS, WIDTH, VOCAB = 23, 8, 31


def inputs(rows: int = ROWS) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB)
    return torch.randn(rows, WIDTH, requires_grad=True), torch.randint(0, VOCAB, (rows,)), head


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", [1, 7, ROWS, 1000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_value_and_gradients_equal_cross_entropy(chunk: int, scale: float) -> None:
    hidden, targets, head = inputs()
    expected = scale * F.cross_entropy(head(hidden), targets, reduction="sum")
    loss = scale * next_token_loss(hidden, targets, head, list(head.parameters()), chunk)
    torch.testing.assert_close(loss, expected)
    wanted = gradients(expected, hidden, head.weight, head.bias)
    for own, reference in zip(gradients(loss, hidden, head.weight, head.bias), wanted, strict=True):
        torch.testing.assert_close(own, reference)


@pytest.mark.parametrize("chunk", [1, 7])
def test_no_supervised_position_gives_zero_with_zero_gradients(chunk: int) -> None:
    hidden, targets, head = inputs(0)
    loss = next_token_loss(hidden, targets, head, list(head.parameters()), chunk)
    assert loss.item() == 0
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_frozen_head_still_passes_the_gradient_on(chunk: int) -> None:
    hidden, targets, head = inputs()
    head.requires_grad_(False)
    loss = next_token_loss(hidden, targets, head, [], chunk)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, hidden), gradients(expected, hidden))


def test_a_head_trains_on_states_without_gradient() -> None:
    hidden, targets, head = inputs()
    loss = next_token_loss(hidden.detach(), targets, head, list(head.parameters()), 7)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(gradients(loss, head.weight), gradients(expected, head.weight))


def test_gradients_flow_on_to_what_made_the_states() -> None:
    hidden, targets, head = inputs()
    body = nn.Linear(WIDTH, WIDTH)
    loss = next_token_loss(body(hidden), targets, head, list(head.parameters()), 7)
    expected = F.cross_entropy(head(body(hidden)), targets, reduction="sum")
    torch.testing.assert_close(gradients(loss, body.weight), gradients(expected, body.weight))


def test_a_tied_table_gets_both_gradients() -> None:
    _, targets, _ = inputs()
    table = torch.randn(VOCAB, WIDTH, requires_grad=True)

    def head(rows: Tensor) -> Tensor:
        return F.linear(rows, table)

    def hidden() -> Tensor:
        return torch.tanh(F.embedding(targets.flip(0), table))

    loss = next_token_loss(hidden(), targets, head, [table], 7)
    expected = F.cross_entropy(head(hidden()), targets, reduction="sum")
    torch.testing.assert_close(gradients(loss, table), gradients(expected, table))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_under_bf16_autocast(chunk: int) -> None:
    hidden, targets, head = inputs()
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(hidden, targets, head, list(head.parameters()), chunk)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.5, rtol=1e-2)
    for own, reference in zip(
        gradients(loss, hidden, head.weight), gradients(expected, hidden, head.weight), strict=True
    ):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, reference, atol=0.05, rtol=5e-2)


def test_bf16_parameters_gather_their_gradient_in_fp32() -> None:
    hidden, targets, head = inputs(400)
    low = nn.Linear(WIDTH, VOCAB).to(torch.bfloat16)
    low.load_state_dict(head.state_dict())
    states = hidden.detach().to(torch.bfloat16).requires_grad_()
    once = gradients(next_token_loss(states, targets, low, list(low.parameters()), 400), low.weight)[0]
    many = gradients(next_token_loss(states, targets, low, list(low.parameters()), 1), low.weight)[0]
    assert once.dtype == many.dtype == torch.bfloat16
    assert (once.float() - many.float()).norm() < 0.01 * once.float().norm()


def test_without_grad_mode_there_is_no_graph() -> None:
    hidden, targets, head = inputs()
    with torch.no_grad():
        loss = next_token_loss(hidden, targets, head, list(head.parameters()), 7)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden), targets, reduction="sum").detach())


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_token_nll_is_cross_entropy_of_each(chunk: int) -> None:
    hidden, targets, head = inputs()
    nll = token_nll(hidden, targets, head, chunk)
    assert not nll.requires_grad
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, F.cross_entropy(head(hidden), targets, reduction="none").detach())


def test_token_nll_of_nothing() -> None:
    hidden, targets, head = inputs(0)
    nll = token_nll(hidden, targets, head, 7)
    assert (nll.shape, nll.dtype) == ((0,), torch.float32)


def test_chunks_are_about_128_mib() -> None:
    assert chunk_rows(32_000) * 32_000 * 4 == pytest.approx(128 * 2**20, rel=0.01)
    assert chunk_rows(10**9) == 64


def test_distances_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    torch.testing.assert_close(cosine_distance(student, teacher), torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(smooth_l1_distance(student, teacher), torch.tensor([0.25, 1.5, 0.75]))
    assert cosine_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def make_pairs(counts: list[int], layers: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Predictions `[layers, n, q, w]` and targets `[n, q, w]` of each rank."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(layers, n, 3, 5, generator=generator), torch.randn(n, 3, 5, generator=generator)) for n in counts
    ]


def plain_contrastive(predictions: Tensor, targets: Tensor, log_scale: Tensor) -> Tensor:
    """Cross-entropy over the cosines of the whole batch."""
    own = torch.arange(len(targets))
    vectors = F.normalize(targets.flatten(1))
    losses = [
        F.cross_entropy(F.normalize(one.flatten(1)) @ vectors.T * log_scale.exp(), own, reduction="none")
        for one in predictions
    ]
    return torch.cat(losses)


def test_the_contrastive_loss_is_cross_entropy_over_cosines() -> None:
    ((predictions, targets),) = make_pairs([6])
    predictions.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    loss, expected = (of(predictions, targets, scale) for of in (contrastive_loss, plain_contrastive))
    torch.testing.assert_close(loss, expected)
    weights = torch.linspace(0.5, 2, len(loss))
    wanted = gradients((expected * weights).sum(), predictions, scale)
    for own, reference in zip(gradients((loss * weights).sum(), predictions, scale), wanted, strict=True):
        torch.testing.assert_close(own, reference)


def _one_rank(rank: int, counts: list[int], folder: str) -> None:
    """A process of the test below: its own part of the loss, and the gradients of it."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=len(counts))
    predictions, targets = make_pairs(counts)[rank]
    for dtype in (torch.float32, torch.bfloat16):
        # Without images a rank knows nothing of the type that the others' predictions have.
        own = dtype if counts[rank] else torch.float32
        given = predictions.detach().to(own, copy=True).requires_grad_()
        scale = torch.tensor(2.0, requires_grad=True)
        loss = contrastive_loss(given, targets, scale)
        loss.sum().backward()
        result = {"loss": loss.detach(), "predictions": given.grad, "scale": scale.grad}
        torch.save(result, f"{folder}/{dtype}-{rank}.pt".replace("torch.", ""))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _one_rank(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])


@pytest.mark.parametrize("counts", [[3, 3], [4, 1], [0, 3]])
def test_gathered_over_processes_it_is_that_of_the_whole_batch(counts: list[int], tmp_path: Path) -> None:
    run_ranks(tmp_path, "tests.core.test_losses", json.dumps(counts), str(tmp_path))
    pairs = make_pairs(counts)
    predictions = torch.cat([one for one, _ in pairs], dim=1).requires_grad_()
    targets = torch.cat([one for _, one in pairs])
    scale = torch.tensor(2.0, requires_grad=True)
    losses = plain_contrastive(predictions, targets, scale)
    losses.sum().backward()
    assert predictions.grad is not None
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        found = [torch.load(tmp_path / f"{dtype}-{rank}.pt", weights_only=True) for rank in range(2)]
        own = torch.cat([one["loss"].view(2, -1) for one in found], dim=1)
        close = {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(own, losses.detach().view(2, -1), **close)
        grads = torch.cat([one["predictions"].float() for one in found], dim=1)
        torch.testing.assert_close(grads, predictions.grad, **close)
        total = sum((one["scale"] for one in found), torch.zeros(()))
        torch.testing.assert_close(total, scale.grad, atol=5 * tolerance, rtol=tolerance)
