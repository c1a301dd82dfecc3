"""The loop that trains a small part on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lit_vlm.core.muon import Muon
from lit_vlm.core.precision import choose


def optimizers_of(model: nn.Module, hidden: list[nn.Parameter], lr: float) -> list[Optimizer]:
    """Muon for the matrices of hidden layers, AdamW for all other parameters."""
    chosen = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(hidden, lr=lr, weight_decay=0.01), AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]


def train(model: nn.Module, optimizers: list[Optimizer], loss: Callable[[int], Tensor], steps: int, title: str) -> None:
    """Train a model on the CPU, at rates that rise for a twentieth of the steps and then fall.

    Args:
        model: what trains.
        optimizers: over its parameters; each has its own highest rate.
        loss: step → loss.
        steps: optimizer steps.
        title: what the progress bar says.
    """
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, o.defaults["lr"], total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
        )
        for o in optimizers
    ]
    model.train()
    precision = choose("cpu")
    with Progress() as progress:
        task = progress.add_task(title, total=steps)
        for step in range(steps):
            with precision.autocast("cpu"):
                value = loss(step)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            progress.update(task, advance=1, description=f"{title} (loss {value.item():.2f})")
