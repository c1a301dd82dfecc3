"""Contract test of adapters on a part."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.core.lora import Adapters, Lora, is_adapter, merge_adapters
from lit_vlm.data.sample.collate import collate
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.testing.rules import broken
from lit_vlm.testing.sharded import Case, ready
from lit_vlm.testing.tiny import samples_for, tiny_slots
from lit_vlm.training.stage import Stage

SAME = 1e-5


def with_adapters(case: Case, slot: str, lora: Lora | None = None) -> Case:
    """The case with adapters on one of its slots; default: of rank 2, on all linear layers of the part's blocks."""
    return replace(case, slots={**case.slots, "lora": Adapters(**{slot: lora or Lora(rank=2, alpha=4.0)})})


def check_adapters(case: Case, slot: str) -> None:
    """Check that a part can have adapters (`model.lora`).

    Args:
        case: a tiny model whose slot `slot` holds the part.
        slot: encoder, projector, embedder or decoder.

    Raises:
        AssertionError: naming the rule that the part breaks.
        ValueError: for a part without linear layers.
    """
    plain = ready(build(tiny_slots(**case.slots)), case).eval()
    model = ready(build(tiny_slots(**with_adapters(case, slot).slots)), case).eval()
    part = model.slots()[slot][0]
    seen, text = samples_for(model, case.sizes)
    batch = collate([*seen, *text])
    before, now = _results(plain, batch, case), _results(model, batch, case)
    if unlike := [name for name in before if not torch.equal(before[name], now[name])]:
        broken(part, f"new adapters change {unlike[0]}", "New adapters change nothing, bit for bit")
    Stage(train={slot: 1e-3}, losses=dict(case.losses)).freeze(model)
    trained = {name: p for name, p in part.named_parameters() if p.requires_grad}
    beside = {id(parameter) for parameter in part.beside_adapters()}
    if base := [name for name, p in trained.items() if not is_adapter(name) and id(p) not in beside]:
        broken(part, f"{base[0]} trains beside adapters", "With adapters the part's own weights stay as they are")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.items():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    loss = torch.stack(list(_losses(model, batch, case).values())).sum()
    if loss.requires_grad:
        loss.backward()
    if idle := [name for name, p in trained.items() if p.grad is None]:
        broken(part, f"{idle[0]} gets no gradient", "A part runs its linear layers, or reads effective_weight(layer)")
    apart = _results(model, batch, case)
    if all(torch.equal(apart[name], now[name]) for name in now):
        broken(part, "adapters change nothing when they are not zero", "A part's result depends on its linear layers")
    merge_adapters(part)
    merged = _results(model, batch, case)
    for name, value in apart.items():
        if not torch.allclose(merged[name], value, SAME, SAME * float(value.abs().max())):
            broken(part, f"{name} is another with merged adapters", "An adapter is an update of its layer's weight")


def _losses(model: VLM, batch: Batch, case: Case) -> dict[str, Tensor]:
    return model(batch, case.losses)


def _results(model: VLM, batch: Batch, case: Case) -> dict[str, Tensor]:
    """Losses, the decoder's inputs, and its logits where the model has a decoder."""
    with torch.no_grad():
        found = _losses(model, batch, case) | {"the decoder's inputs": model.embed(batch)}
        return found if case.leave_out else found | {"the logits": model.logits(batch)}
