"""Muon beside AdamW in one optimizer."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from lit_vlm.training.optim import MuonAdamW
from lit_vlm.training.stage import Stage
from tests.tiny import batch_of, tiny_vlm

MuonTiny = partial(MuonAdamW, betas=(0.9, 0.98), eps=1e-8)


def groups_of(model: nn.Linear) -> list[dict[str, object]]:
    return [
        {"params": [model.weight], "lr": 0.02, "weight_decay": 0.1, "muon": True},
        {"params": [model.bias], "lr": 0.01, "weight_decay": 0.0, "muon": False},
    ]


def take(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()


def test_an_update_of_muon_is_orthogonal_and_as_large_as_adamws() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    start = model.weight.detach().clone()
    take(model, MuonTiny(groups_of(model)), range(1))
    update = (start * (1 - 0.02 * 0.1) - model.weight.detach()) / 0.02
    # 0.2 × √8 times a matrix whose singular values five steps of Newton–Schulz bring near 1.
    values = torch.linalg.svdvals(update) / (0.2 * 8**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_biases_take_the_step_of_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(
        [{"params": [twin.bias], "lr": 0.01, "weight_decay": 0.0}], betas=(0.9, 0.98), eps=1e-8, fused=True
    )
    take(model, MuonTiny(groups_of(model)), range(1))
    take(twin, plain, range(1))
    torch.testing.assert_close(model.bias, twin.bias, rtol=0, atol=0)
    assert not torch.equal(model.weight, twin.weight)


def test_schedules_and_saved_states_reach_both() -> None:
    torch.manual_seed(0)
    whole = nn.Linear(8, 4)
    cut = copy.deepcopy(whole)

    def made(model: nn.Linear) -> tuple[MuonAdamW, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = MuonTiny(groups_of(model))
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    optimizer, schedule = made(whole)
    for step in range(6):
        take(whole, optimizer, range(step, step + 1))
        schedule.step()
    optimizer, schedule = made(cut)
    for step in range(3):
        take(cut, optimizer, range(step, step + 1))
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, schedule = made(cut)
    optimizer.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    for step in range(3, 6):
        take(cut, optimizer, range(step, step + 1))
        schedule.step()
    torch.testing.assert_close(cut.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_the_stage_gives_matrices_to_muon_and_all_else_to_adamw() -> None:
    model = tiny_vlm()
    stage = Stage(train={"projector": 1e-3, "decoder": 2e-3}, optimizer="muon")
    stage.freeze(model)
    optimizer = stage.make_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[bool, set[str]] = {True: set(), False: set()}
    for group in optimizer.param_groups:
        groups[group["muon"]] |= {names[id(p)] for p in group["params"]}
        assert group["lr"] == {"projector": 1e-3, "decoder": 2e-3}[group["slot"]]
    assert {"decoder.lm.model.embed_tokens.weight", "decoder.lm.lm_head.weight"} <= groups[True]
    assert all("norm" in name or name.endswith("bias") for name in groups[False])
    assert all(name.endswith("weight") and "norm" not in name for name in groups[True])
    assert len(groups[True]) + len(groups[False]) == sum(p.requires_grad for p in model.parameters())
    model(batch_of(model), {"next_token": 1.0})["next_token"].backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
