"""Rules that parts of several slots have in common; all functions but `numbers` raise AssertionErrors (`broken`)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lit_vlm.core.part import Part, load_state, meta_parameters
from lit_vlm.training.sharding import OncePerForward

T = TypeVar("T")
P = TypeVar("P", bound=Part)
PAGE = "docs/extending.md"
NEAR = 1e-4


def broken(thing: object, found: str, rule: str) -> NoReturn:
    """End a check by an error.

    Args:
        thing: the object that was checked, or its class.
        found: what the object does.
        rule: what it should do, as a sentence.

    Raises:
        AssertionError: always.
    """
    name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    raise AssertionError(f"{name}: {found}. {rule} ({PAGE})")


def pickled(thing: object, what: str, value: T) -> T:
    """A copy of `value`, pickled and loaded, as loader workers get it; `what` names it in the message."""
    try:
        copy: T = pickle.loads(pickle.dumps(value))
    except Exception as error:  # a class may raise anything when it is pickled
        broken(thing, f"{what} does not pickle: {error}", "Loader workers get a copy: no lambda, no bound method")
    return copy


def built(factory: Callable[[], P], kind: Any) -> P:
    """Check how a part is constructed, and return it with random weights in eval mode."""
    part = factory()
    if not isinstance(part, kind):
        broken(part, f"is no {kind.__name__}", f"It must be a subclass of {kind.__module__}.{kind.__name__}")
    if part.pretrained_state() is not None:
        broken(part, "has pretrained weights", "Give the contract test a tiny member with random weights")
    with meta_parameters():
        twin = factory()
    if real := [name for name, parameter in twin.named_parameters() if not parameter.is_meta]:
        broken(part, f"{real[0]} is not on the meta device when it should be", "Constructors use nn.Parameter")
    if unlike := part.state_dict().keys() ^ twin.state_dict().keys():
        broken(part, f"{sorted(unlike)[0]} is there in one of two constructions", "Constructors build the same twice")
    if part.identity() != twin.identity():
        broken(part, "two alike have different identity()", "It is text that two alike parts have in common")
    return part.eval()


def same_when_loaded(part: P, factory: Callable[[], P], run: Callable[[P], Tensor]) -> None:
    """Check that a part that is built without weights and then loads those of `part` gives the same result of `run`."""
    with meta_parameters(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)  # numbers that a constructor draws must be saved, or not matter
        twin = factory()
    load_state(twin, {key: value.clone() for key, value in part.state_dict().items()}, "part")
    twin.eval()
    with torch.no_grad():
        expected, found = run(part), run(twin)
    if not torch.allclose(expected, found, NEAR, NEAR):
        broken(part, "is another after save and load", "What decides features is saved: buffers drawn at random too")


def blocks_run_once(part: Part, run: Callable[[], Any], slot: str) -> None:
    """Check that each block of a part runs once in `run`, and in order, which sharded training needs."""
    blocks = list(part.blocks())
    own = list(part.modules())
    for index, block in enumerate(blocks):
        if not any(block is module for module in own):
            broken(part, f"block {index} is none of its modules", "blocks() lists modules of the part")
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            broken(part, f"block {index} is a {type(block).__name__}", "A list never runs itself: name what is in it")
    if len({id(block) for block in blocks}) < len(blocks):
        broken(part, "blocks() names a module twice", "Each block runs exactly once per forward pass")
    OncePerForward(f"{slot} {type(part).__name__}", part, blocks)
    try:
        run()
    except ValueError as error:
        raise AssertionError(f"{error} ({PAGE})") from error


def all_train(part: Part, loss: Tensor, why: str, unread: Sequence[str] = ()) -> None:
    """Check that a loss gives each parameter of a part a gradient, except names with an ending in `unread`."""
    part.zero_grad()
    loss.backward()
    without = [name for name, p in part.named_parameters() if p.requires_grad and p.grad is None]
    if without := [name for name in without if not name.endswith(tuple(unread))]:
        broken(part, f"{without[0]} gets no gradient {why}", "Every parameter takes part on every process")


def near(thing: object, found: Tensor, expected: Tensor, what: str, rule: str) -> None:
    """Check that two results agree within a small tolerance."""
    if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), NEAR, NEAR):
        broken(thing, what, rule)


def numbers(found: Sequence[object]) -> str:
    """The first three of some numbers, as text for a message."""
    return ", ".join(str(one) for one in found[:3])
