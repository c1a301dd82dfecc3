"""Muon in bf16 and in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_vlm.core import muon
from lit_vlm.core.muon import Muon

SHAPES = [(8, 8), (6, 16), (16, 6)]


def stepped(shape: tuple[int, int], optimizer: type[torch.optim.Muon], **settings: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(shape, generator=generator))
    taken = optimizer([matrix], lr=0.02, weight_decay=0.1, **settings)  # type: ignore[arg-type]
    for _ in range(3):
        matrix.grad = torch.randn(shape, generator=generator)
        taken.step()
    return matrix.detach()


def emulated(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(muon, "emulates_bf16", lambda device: yes)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_bf16_is_there_steps_are_torchs(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(monkeypatch, False)
    expected = stepped(shape, torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    torch.testing.assert_close(stepped(shape, Muon), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_bf16_is_emulated_steps_are_as_good_in_fp32(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated(monkeypatch, False)
    rounded = stepped(shape, Muon)
    emulated(monkeypatch, True)
    found = stepped(shape, Muon)
    assert not torch.equal(found, rounded)  # the other way was taken
    torch.testing.assert_close(found, rounded, rtol=0, atol=2e-3)  # an update of 0.02 × 0.2 × 4, in bf16's eight bits


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_in_fp32_is_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(muon.orthogonal(matrix, Muon([nn.Parameter(matrix)]).param_groups[0]))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_matrix_without_a_gradient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated(monkeypatch, True)
    trained, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon([trained, idle])
    trained.grad = torch.ones(2, 2)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(idle, torch.ones(2, 2))
    assert not torch.equal(trained, torch.ones(2, 2))
    assert list(optimizer.state) == [trained]
