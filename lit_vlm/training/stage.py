"""A stage: which slots train, at which learning rate, and which losses are on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from lit_vlm.core.lora import is_adapter, trained_parameters
from lit_vlm.core.part import Part
from lit_vlm.core.quantised import own_weights
from lit_vlm.heads import Head
from lit_vlm.model.vlm import NEXT_TOKEN, VLM
from lit_vlm.training.layer_decay import layer_scales
from lit_vlm.training.optim import MuonAdamW, group_of, split_for_muon

SLOTS = ("encoder", "projector", "embedder", "decoder", "heads")
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}


class SlotCount(NamedTuple):
    """Numbers of trained and frozen parameters of one slot, its peak learning rate, and the least of its layers."""

    slot: str
    part: str
    trained: int
    frozen: int
    lr: float | None
    least_lr: float | None = None


@dataclass
class Stage:
    """One stage of a recipe.

    Attributes:
        name: what the stage is called in paths and in MLflow.
        train: slot → peak learning rate (encoder, projector, embedder, decoder, heads). A slot that is not named, or
            named with null, is frozen.
        layer_decay: slot → factor, above 0 and at most 1, by which the learning rate falls with each block from the
            end of the part to its beginning (`layer_decay.layer_scales`); for parts with blocks.
        only: slot → name of a group of its parameters, as the part defines it; the others stay frozen.
        losses: loss → weight: `next_token`, or the name of a head. 0 turns it off and skips its work.
        start_from: weights that an earlier stage left: a checkpoint, or the folder of its run. Or published ones, as
            `FAMILY:FOLDER` or `FAMILY:HUB_NAME` (eve, eve_v2, fuyu, hovle, hovle_hd, llava-hf, llava_next,
            mono_internvl, ola_vlm), such as `eve:BAAI/EVE-7B-Pretrain-v1.0`.
        fresh: slots that do not take their weights from `start_from`.
        leave_out: slots that this stage does without, `decoder` at most: where no loss reads it, its weights are
            neither kept on the device nor saved. A later stage takes them anew, with `fresh: [decoder]`.
        frozen_dtype: type that frozen weights are stored in. `compute` is that of matrix products (bf16 under
            bf16-mixed), in which they are used anyway: half the memory, and the same losses and checkpoints. `full`
            leaves them in fp32.
        schedule: learning rate after the warm-up: cosine to 0, linear to 0, constant, or wsd (warm-up, stable, decay),
            which is constant and then falls to 0 as 1 − √t (Hägele et al. 2024, arXiv 2405.18392).
        warmup_ratio: share of all steps over which the learning rate rises from 0.
        decay_ratio: share of all steps at the end over which wsd falls; for wsd only.
        optimizer: adamw, or muon for matrices and adamw for all else: about half the steps in short runs of small
            models.
        weight_decay: on matrices; never on biases and norms.
        betas: decay rates of AdamW's running averages.
        eps: added to AdamW's denominator.
        ema: decay per optimizer step of an exponential moving average of the weights that train, such as 0.999. The
            average is what the stage leaves (`average.WeightAverage`). Null: the weights of the last step.

    Raises:
        ValueError: for an unknown slot, or a value that is out of range.
    """

    name: str = "stage"
    train: dict[str, float | None] = field(default_factory=dict)
    layer_decay: dict[str, float | None] = field(default_factory=dict)
    only: dict[str, str | None] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=lambda: {NEXT_TOKEN: 1.0})
    start_from: str | None = None
    fresh: list[str] = field(default_factory=list)
    leave_out: list[Literal["decoder"]] = field(default_factory=list)
    frozen_dtype: Literal["compute", "full"] = "compute"
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: float = 0.03
    decay_ratio: float = 0.2
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    ema: float | None = None

    def __post_init__(self) -> None:
        for key in ("train", "layer_decay", "only", "fresh"):
            for name in getattr(self, key):
                if name not in SLOTS:
                    raise ValueError(f"model.stage.{key} names '{name}', which is no slot; slots: {', '.join(SLOTS)}")
        self._check_factors()
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"model.stage.warmup_ratio is a share between 0 and 1, not {self.warmup_ratio}")
        if not 0 <= self.decay_ratio <= 1:
            raise ValueError(f"model.stage.decay_ratio is a share between 0 and 1, not {self.decay_ratio}")
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"model.stage: warmup_ratio {self.warmup_ratio} and decay_ratio {self.decay_ratio} make more than all "
                "steps"
            )
        if any(lr is not None and lr < 0 for lr in self.train.values()):
            raise ValueError(f"model.stage.train has a negative learning rate: {self.train}")

    def _check_factors(self) -> None:
        for slot, decay in self.layer_decay.items():
            if decay is not None and not 0 < decay <= 1:
                raise ValueError(f"model.stage.layer_decay.{slot} is above 0 and at most 1, such as 0.75, not {decay}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"model.stage.ema is between 0 and 1, such as 0.999, or null, not {self.ema}")

    def freeze(self, model: VLM, removed: Collection[str] = ()) -> None:
        """Let the named slots train and freeze everything else.

        Args:
            model: the model whose parameters are frozen or not.
            removed: heads that a flag has set to null; the stage may still name their losses.

        Raises:
            ValueError: for a slot that the model lacks or that has nothing to train, a decay of layers that do not
                train or are no blocks, an unknown loss, or a head that trains without its loss.
        """
        slots = model.slots()
        model.requires_grad_(False)
        for slot, lr in self.train.items():
            if lr is None:
                continue
            parameters = self._chosen(slot, slots.get(slot, ()))
            if not parameters and not (slot == "heads" and removed):
                raise ValueError(
                    f"model.stage.train names '{slot}', but this model has nothing to train there: "
                    "remove it or set it to null"
                )
            for parameter in parameters:
                parameter.requires_grad_(True)
        for parameter in model.embedder.replaced(model.decoder):
            parameter.requires_grad_(False)
        self._check_layers(slots)
        known = {NEXT_TOKEN, *model.heads, *removed}
        if unknown := set(self.losses) - known:
            raise ValueError(f"model.stage.losses names {sorted(unknown)}; this model has {sorted(known)}")
        if not any(self.losses.values()):
            raise ValueError("model.stage.losses has no loss with a weight other than 0")
        if "decoder" in self.leave_out:
            self._check_decoder_idle(model)
        idle = [name for name in model.heads if not self.losses.get(name)]
        for name in idle:
            model.heads[name].requires_grad_(False)

    def _chosen(self, slot: str, parts: Iterable[Part]) -> list[nn.Parameter]:
        """The parameters of a slot that train."""
        try:
            return [p for part in parts for p in trained_parameters(part, self.only.get(slot))]
        except ValueError as error:
            raise ValueError(f"{error}: set model.stage.only.{slot} to null") from error

    def _check_layers(self, slots: Mapping[str, Iterable[Part]]) -> None:
        for slot in self.layer_decay:
            self._layer_scales(slot, slots.get(slot, ()))

    def _layer_scales(self, slot: str, parts: Iterable[Part]) -> dict[int, float]:
        """The factors of a slot's learning rates by id of the parameter; empty where all have the same."""
        decay = self.layer_decay.get(slot)
        if decay is None:
            return {}
        way_out = f"set model.stage.layer_decay.{slot} to null"
        if self.train.get(slot) is None:
            raise ValueError(
                f"model.stage.layer_decay names '{slot}', which model.stage.train does not train: {way_out}"
            )
        try:
            return {key: scale for part in parts for key, scale in layer_scales(part, decay).items()}
        except ValueError as error:
            raise ValueError(f"model.stage.layer_decay names '{slot}': {error}: {way_out}") from error

    def _check_decoder_idle(self, model: VLM) -> None:
        heads = {name: head for name, head in model.heads.items() if isinstance(head, Head) and self.losses.get(name)}
        reading = [name for name, head in heads.items() if any(isinstance(tap, int) and tap > 0 for tap in head.taps)]
        if self.losses.get(NEXT_TOKEN):
            reading.append(NEXT_TOKEN)
        if reading:
            raise ValueError(f"model.stage.leave_out names the decoder, which these losses run: {', '.join(reading)}")

    def remarks(self, model: VLM) -> list[str]:
        """Warnings, a line each, of settings that are allowed but rarely meant; call it after `freeze`.

        One is a frozen part that stays random, where its class cannot have pretrained weights: an encoder or a decoder
        made from a `config` is random on purpose.
        """
        lines = [line for name in sorted(model.drawn) if (line := self._stays_random(model, name))]
        if self.train.get("heads") and model.heads and not any(self.losses.get(name) for name in model.heads):
            lines.append(
                "model.stage.train names heads, and no head has a loss with a weight in model.stage.losses, so none "
                f"trains: {', '.join(model.heads)}"
            )
        return lines

    def _stays_random(self, model: VLM, name: str) -> str | None:
        slot, _, head = name.partition(".")
        part = model.get_submodule(name)
        assert isinstance(part, Part)
        own = {name: p for name, p in part.named_parameters() if not is_adapter(name)}
        count = sum(parameter.numel() for parameter in own.values())
        trains = any(parameter.requires_grad for parameter in own.values())
        if not count or trains or type(part).pretrained_state is not Part.pretrained_state:
            return None
        if head and not self.losses.get(head):
            return None
        why = f", as model.stage.fresh names {slot}" if slot in self.fresh and self.start_from else ""
        read = f" has a loss of weight {self.losses[head]:g} and" if head else ""
        frozen, way_out = "it is frozen", f"name {slot} in model.stage.train"
        if not part.frozen():
            frozen, way_out = "only its adapters train", f"set model.lora.{slot} to null"
        return (
            f"{name} ({type(part).__name__}, {count:,} parameters){read} starts from random weights{why}, and "
            f"{frozen}, so it stays random: {way_out}, or give it weights by model.stage.start_from"
        )

    def warm_up(self, total_steps: int) -> int:
        """Steps over which the learning rate rises: ⌈warmup_ratio · total⌉."""
        return math.ceil(total_steps * self.warmup_ratio)

    def schedule_remark(self, total_steps: int) -> str | None:
        """A warning where the learning rate never reaches its peak; None where it does."""
        if self.warm_up(total_steps) < max(total_steps, 1):
            return None
        steps = "the only step has" if total_steps <= 1 else f"the first of {total_steps} steps has"
        return (
            f"the warm-up covers all steps: {steps} learning rate 0, and none has the peak rate; set "
            "model.stage.warmup_ratio to 0, or train for more steps (trainer.max_steps)"
        )

    def make_optimizer(self, model: VLM, fused: bool = True) -> Optimizer:
        """The optimizer with one learning rate per slot, over what `freeze` left trainable.

        Args:
            model: after `freeze`.
            fused: one kernel for all parameters. Not with scaled gradients, which it would unscale inside, after they
                were clipped and logged.

        Raises:
            ValueError: when nothing trains.
        """
        groups = list(self._groups(model))
        if not groups:
            raise ValueError("model.stage.train names no slot, so there is nothing to train")
        if self.optimizer == "muon":
            return MuonAdamW(split_for_muon(groups), self.betas, self.eps)
        return AdamW(groups, betas=self.betas, eps=self.eps, fused=fused)

    def _groups(self, model: VLM) -> Iterator[dict[str, Any]]:
        seen: set[int] = set()
        for slot, parts in model.slots().items():
            trained = [p for part in parts for p in part.parameters() if p.requires_grad]
            parameters = [p for p in trained if id(p) not in seen]
            seen |= {id(p) for p in parameters}
            scales = self._layer_scales(slot, parts)
            for scale in sorted({scales.get(id(p), 1.0) for p in parameters}):
                layer = [p for p in parameters if scales.get(id(p), 1.0) == scale]
                for decay, members in (
                    (self.weight_decay, [p for p in layer if p.ndim > 1]),
                    (0.0, [p for p in layer if p.ndim <= 1]),
                ):
                    if members:
                        yield group_of(members, slot, self.train[slot] or 0.0, scale, decay)

    def scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        """The learning-rate schedule: warm-up over ⌈warmup_ratio · total⌉ steps, then `schedule`."""
        warm_up = self.warm_up(total_steps)
        falling = min(math.ceil(total_steps * self.decay_ratio), total_steps - warm_up)
        return get_scheduler(
            SCHEDULES[self.schedule],
            optimizer,
            num_warmup_steps=warm_up,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=(
                {"num_decay_steps": falling, "decay_type": "1-sqrt"} if self.schedule == "wsd" else None
            ),
        )

    def summary(self, model: VLM) -> list[SlotCount]:
        """Trained and frozen parameters of each slot."""
        rows = []
        for slot, parts in model.slots().items():
            found = {key: (number, trains) for part in parts for key, number, trains in own_weights(part)}
            trained = sum(number for number, trains in found.values() if trains)
            total = sum(number for number, _ in found.values())
            names = ", ".join(type(part).__name__ for part in parts)
            lr = self.train.get(slot) if trained else None
            scales = self._layer_scales(slot, parts) if trained else {}
            factors = [scales.get(id(p), 1.0) for part in parts for p in part.parameters() if p.requires_grad]
            rows.append(SlotCount(slot, names, trained, total - trained, lr, lr and lr * min(factors)))
        return rows


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that do not train, and buffers of modules that hold nothing trainable, by name."""
    tensors: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters()):
            continue
        # Under all names, as modules may register one tensor under a second name later, as rotary tables that grow do.
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            tensors[f"{prefix}.{name}"] = buffer
    return tensors
