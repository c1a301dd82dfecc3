"""Tiny models of all systems with a batch of their own data, and comparisons of values."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_vlm.commands.fit import lightning_cli
from lit_vlm.commands.recipe import find_recipe
from lit_vlm.core.batch import Batch
from lit_vlm.data.feed.batching import GlobalBatch
from lit_vlm.data.feed.loader import SourceDataset, assemble
from lit_vlm.model.build import build, load_teachers
from lit_vlm.model.vlm import VLM
from lit_vlm.planning import no_gpu


class System(NamedTuple):
    """A model on the CPU with a batch, and the weights of its losses."""

    model: VLM
    batch: Batch
    losses: dict[str, float]


def words_of(recipe: str, stage: str, *flags: str) -> list[str]:
    """Arguments of `lit-vlm fit` for a tiny stage, behind the word fit."""
    configs = find_recipe(recipe).configs(stage, "tiny", "single")
    return [*(word for path in configs for word in ("--config", str(Path(path).resolve()))), *flags]


def tiny_system(recipe: str, stage: str, folder: Path) -> System:
    """A stage's tiny model as it trains, with random weights and the first batch of its data."""
    cli: Any = lightning_cli(
        words_of(recipe, stage, "--trainer.logger", "false", "--trainer.default_root_dir", str(folder)), run=False
    )
    module, data = cli.model, cli.datamodule
    module.stage.start_from, module.stage.fresh = None, []
    module.model = build(module.slots)
    module.stage.freeze(module.model, module.slots.removed_heads)
    load_teachers(module.model, [name for name in module.model.heads if module.stage.losses.get(name)])
    module.model.train()
    spec = module.input_spec
    plan = data.plan(data.train_sources, spec, 0, GlobalBatch(data.batch_size, 1, 1), shuffle=True)
    dataset = SourceDataset(data.train_sources, data.sample_encoder(spec))
    (places,) = islice(iter(plan), 1)
    batch = assemble([dataset[place] for place in places], data.collator(spec, prepared=tuple(spec.known)))
    return System(module.model, batch, dict(module.stage.losses))


class Values(NamedTuple):
    """Losses by name, and gradients by name of parameter, in fp32 on the CPU."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def values(system: System, device: str, dtype: torch.dtype) -> Values:
    """Forward and backward of a system's batch on a device."""
    model, batch = system.model.to(device), system.batch.to(device)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
        losses = model(batch, system.losses)
    sum(weight * losses[name] for name, weight in system.losses.items() if weight).backward()
    # Copies: gradients that the model still holds go with it to another device.
    gradients = {
        n: p.grad.to("cpu", torch.float32, copy=True) for n, p in model.named_parameters() if p.grad is not None
    }
    return Values({name: loss.detach().float().cpu() for name, loss in losses.items()}, gradients)


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of each gradient, by name; of a small one, over a thousandth of the largest norm.

    The bias of keys under a softmax has a gradient of nothing but rounding, for one.
    """
    least = 1e-3 * max(float(gradient.norm()) for gradient in expected.values())
    return {
        name: float((found[name] - gradient).norm()) / max(least, float(gradient.norm()))
        for name, gradient in expected.items()
    }


def needs_values() -> None:
    """End a test here on a simulated GPU, which computes no values: the code before has run, nothing is compared."""
    if no_gpu.loaded():
        pytest.skip("it ran as far as a simulated GPU goes, which computes no values to compare")
