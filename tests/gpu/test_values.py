"""Losses and gradients of every system on the GPU are those of the CPU, in fp32 and in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_vlm.commands.recipe import find_recipe
from tests.gpu.systems import error, errors, needs_values, tiny_system, values
from tests.test_systems import RECIPES

STAGES = [(name, stage) for name in ("llava15", *RECIPES) for stage in find_recipe(name).stages[:2]]
FP32, BF16 = 1e-4, 0.02


@pytest.fixture(autouse=True)
def same_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are resized on the CPU: they are rounded to whole levels, and many lie so near to a half that rounding
    errors of fp32 decide, which alone moved gradients by 6e-3."""
    resize = F.interpolate

    def on_cpu(pixels: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        if not settings.get("antialias"):
            return resize(pixels, *arguments, **settings)
        return resize(pixels.cpu(), *arguments, **settings).to(pixels.device)

    monkeypatch.setattr(F, "interpolate", on_cpu)


@pytest.mark.parametrize(("recipe", "stage"), STAGES)
def test_a_step_gives_the_losses_and_gradients_of_the_cpu(recipe: str, stage: str, tmp_path: Path) -> None:
    system = tiny_system(recipe, stage, tmp_path)
    exact = values(system, "cpu", torch.float32)
    rounded = values(system, "cpu", torch.bfloat16)
    found = {dtype: values(system, "cuda", dtype) for dtype in (torch.float32, torch.bfloat16)}
    for one in found.values():
        assert one.losses.keys() == exact.losses.keys()
        assert one.gradients.keys() == exact.gradients.keys()
    needs_values()
    for name, loss in exact.losses.items():
        assert error(found[torch.float32].losses[name], loss) < FP32, name
        assert error(found[torch.bfloat16].losses[name], loss) < BF16, name
    off = {dtype: errors(one.gradients, exact.gradients) for dtype, one in found.items()}
    assert {name: value for name, value in off[torch.float32].items() if value > FP32} == {}
    # bf16 on the GPU may be as far from fp32 as bf16 on the CPU is, and half as far again.
    bounds = errors(rounded.gradients, exact.gradients)
    assert {n: value for n, value in off[torch.bfloat16].items() if value > BF16 + 1.5 * bounds[n]} == {}


def test_logits_are_those_of_the_cpu(tmp_path: Path) -> None:
    system = tiny_system("llava15", "2_sft", tmp_path)
    system.model.eval()
    with torch.no_grad():
        expected = system.model.logits(system.batch)
        model, batch = system.model.to("cuda"), system.batch.to("cuda")
        found = model.logits(batch).cpu()
        with torch.autocast("cuda", torch.bfloat16):
            rounded = model.logits(batch).float().cpu()
    needs_values()
    kept = system.batch.segment_ids > 0
    assert error(found[kept], expected[kept]) < FP32
    assert error(rounded[kept], expected[kept]) < BF16
