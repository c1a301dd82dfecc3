"""Frozen weights that a checkpoint leaves out: where they came from, and whether they are still the same.

A run whose slots have adapters saves what trains. The frozen rest is read again from where its stage took it: the
part's own pretrained weights, or the checkpoint that the stage started from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_vlm.core.lora import has_adapters, is_adapter, split_state, trained_parameters
from lit_vlm.core.part import Part, StateDict, hash_tensors

PRETRAINED = ""


@dataclass(frozen=True)
class Base:
    """Where the weights of a slot that a checkpoint leaves out came from.

    Attributes:
        start: the checkpoint that the stage started from, or published weights; `PRETRAINED` for the part's own.
        near: the same path, seen from the folder of the checkpoint; a run that was moved with it is found there.
        part: class and name of the part, for messages.
        digest: `digest_of` the weights that are left out.
    """

    start: str
    near: str
    part: str
    digest: str


@dataclass(frozen=True)
class Found:
    """The base of a slot, after checkpoints that it names were read.

    Attributes:
        base: as the checkpoint says.
        own: names of the weights that the checkpoint itself has.
        pretrained: whether weights are still missing, which are the part's pretrained ones.
        origin: the checkpoint, for messages.
    """

    base: Base
    own: frozenset[str]
    pretrained: bool
    origin: str

    def whole(self, part: Part, state: StateDict) -> StateDict:
        """The weights with those that only the part's pretrained ones have.

        Raises:
            ValueError: where the part has no pretrained weights, or cannot find them.
        """
        if not self.pretrained:
            return state
        try:
            below = part.pretrained_state()
        except (ValueError, OSError) as error:
            raise ValueError(f"{self._said()}, which cannot be read: {error}") from error
        if below is None:
            raise ValueError(f"{self._said()}, and {type(part).__name__} has none here: name them as that stage did")
        return below | state

    def check(self, state: StateDict) -> None:
        """Check that the weights which were left out are those of the time of training.

        Args:
            state: all weights of the part.

        Raises:
            ValueError: where they differ.
        """
        found = digest_of({key: value for key, value in state.items() if key not in self.own})
        if found != self.base.digest:
            raise ValueError(
                f"{self._said()}, and these are other weights now (digest {found}, then {self.base.digest}): give it "
                "back what it was trained on"
            )

    def _said(self) -> str:
        where = f"'{self.base.start}'" if self.base.start else "its pretrained weights"
        return f"{self.origin} holds only what trained; the rest of {self.base.part} came from {where}"


class SavedSlots(dict[str, StateDict]):
    """Weights by slot, as read from a checkpoint.

    Attributes:
        bases: slot → the base of a slot whose frozen weights the checkpoint left out.
    """

    def __init__(self, states: Mapping[str, StateDict], bases: Mapping[str, Found] | None = None) -> None:
        super().__init__(states)
        self.bases = dict(bases or {})


def digest_of(state: Mapping[str, Tensor]) -> str:
    """A hash of weights, rounded to bf16, so that a run in bf16 and one in fp32 agree on it."""
    # One after the other: rounded, all together would take half of the model's memory again.
    named = sorted(state.items())
    return hash_tensors(
        (name, value.to(torch.bfloat16) if value.is_floating_point() else value) for name, value in named
    )


def left_out(part: Part) -> set[str]:
    """Names of the weights that need not be saved: those of a frozen part, or the frozen ones beside adapters.

    A part that trains in part, without adapters, is saved whole.
    """
    if part.frozen():
        return set(part.state_dict())
    if not has_adapters(part):
        return set()
    trained = {id(parameter) for parameter in trained_parameters(part)}
    return {
        name
        for name, parameter in part.named_parameters(remove_duplicate=False)
        if not is_adapter(name) and id(parameter) not in trained
    }


def base_of(part: Part, start: str, near: str) -> Base | None:
    """The base of a part, of its whole weights on the CPU; None where all of it is saved.

    Args:
        part: after `Stage.freeze`.
        start: as in `Base`.
        near: as in `Base`.
    """
    gone = left_out(part)
    plain, _ = split_state(part.state_dict())
    kept, _ = split_state(
        {key: value for key, value in part.state_dict().items() if key not in gone or is_adapter(key)}
    )
    if not gone:
        return None
    name = getattr(part, "name", None)
    described = f"{type(part).__name__}{f' {name}' if isinstance(name, str) else ''}"
    return Base(start, near, described, digest_of({key: value for key, value in plain.items() if key not in kept}))
