"""What every slot of the model has in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]


class Part(nn.Module):
    """A member of a slot: an encoder, projector, embedder, decoder or head.

    The constructor builds the architecture and nothing else: it may run on the meta device, and it must not read
    weights. Whoever assembles the model asks `pretrained_state` for weights afterwards.
    """

    def pretrained_state(self) -> StateDict | None:
        """Pretrained weights under this part's own keys, or None to keep the random ones."""
        return None

    def find_pretrained(self) -> None:
        """Check that the weights of `pretrained_state` are there, without reading them.

        Raises:
            ValueError: saying what is missing.
        """
        return

    def adapt_state(self, state: StateDict) -> StateDict:
        """Rename the keys of weights that an earlier stage saved, where this part wraps its modules differently."""
        return state

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments that build this architecture again where no other file is at hand, for exports.

        A part that reads a configuration from a hub name or folder gives that configuration in its place.

        Args:
            arguments: those that it was built with, as a config writes them.
        """
        return dict(arguments)

    def trainable_parameters(self, only: str | None = None) -> Iterable[nn.Parameter]:
        """The parameters that train when a stage trains this slot.

        Args:
            only: a group of them that the part has a name for; default: all.

        Raises:
            ValueError: for a group that the part does not have.
        """
        if only is not None:
            raise ValueError(f"model.stage.only names '{only}', and {type(self).__name__} has no such group")
        return self.parameters()

    def beside_adapters(self) -> Iterable[nn.Parameter]:
        """Parameters that train whole where this part has adapters (`core.lora`), such as rows for new tokens."""
        return ()

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated blocks: the units that sharded training gathers one at a time."""
        return ()

    def identity(self) -> str:
        """Class, plain settings, and names and shapes of all weights, as text: equal for parts that are built alike."""
        settings = {
            key: value
            for key, value in sorted(vars(self).items())
            if not key.startswith("_") and key != "training" and isinstance(value, str | int | float | bool | None)
        }
        shapes = sorted((name, tuple(tensor.shape)) for name, tensor in self.state_dict().items())
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
        return f"{type(self).__qualname__} {settings} {digest}"

    def digest(self) -> str:
        """A hash of all weights; not for parts that are sharded or on the meta device."""
        return hash_tensors(sorted(self.state_dict().items()))

    def frozen(self) -> bool:
        """Whether no parameter of this part trains."""
        return not any(parameter.requires_grad for parameter in self.parameters())


def standalone_class(part: Part, given: Mapping[str, Any]) -> dict[str, Any]:
    """A part's class with arguments that need no other file; see `Part.standalone`.

    Args:
        part: the part.
        given: `class_path` and `init_args` that it was built from.
    """
    return {"class_path": given["class_path"], "init_args": part.standalone(given.get("init_args") or {})}


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors and their names, in order; not for those that are sharded or on the meta device."""
    hashes = [(name, torch.hash_tensor(tensor).view(torch.int64).item()) for name, tensor in tensors]
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:12]


_register = nn.Module.register_parameter


def _register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    # A parameter that is on the meta device already stays as it is: a copy would break the tie of shared parameters.
    if param is not None and not param.is_meta:
        param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
    _register(module, name, param)


@contextmanager
def _registering(function: Callable[..., None]) -> Iterator[None]:
    before = nn.Module.register_parameter
    nn.Module.register_parameter = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = before  # type: ignore[method-assign]


def meta_parameters() -> AbstractContextManager[None]:
    """Build modules with parameters on the meta device but real buffers.

    Buffers stay real because tables such as rotary frequencies are computed in constructors and saved nowhere: made on
    the meta device they would come back as uninitialised memory.
    """
    return _registering(_register_on_meta)


def real_parameters() -> AbstractContextManager[None]:
    """Build modules with real parameters, inside `meta_parameters` too."""
    return _registering(_register)


def check_state(part: Part, state: StateDict, name: str) -> None:
    """Check that `state` has the names and shapes of this part's weights; nothing is loaded.

    Raises:
        ValueError: naming the slot, the missing and the surplus keys, and the shapes that differ.
    """
    own = part.state_dict()
    missing = sorted(own.keys() - state.keys())
    surplus = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    if missing or surplus or shapes:
        problems = [
            f"{title}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
            for title, keys in (("missing", missing), ("not of this part", surplus), ("other shape", shapes))
            if keys
        ]
        slot = name.split(".")[0]
        raise ValueError(
            f"the weights do not fit the slot '{name}' ({type(part).__name__}): {'; '.join(problems)}. "
            f"If this part is meant to start anew, add '{slot}' to model.stage.fresh."
        )


def load_state(part: Part, state: StateDict, name: str) -> None:
    """Load `state` into `part`, whose parameters may be on the meta device; raises as `check_state`."""
    check_state(part, state, name)
    own, ties = part.state_dict(), _ties(part)
    cast = {key: value.to(own[key].dtype) if value.is_floating_point() else value for key, value in state.items()}
    part.load_state_dict(cast, strict=True, assign=any(p.is_meta for p in part.parameters()))
    for places in ties:
        source = next((place for place in places if place.name in own), places[0])
        for place in places:
            setattr(place.module, place.attribute, getattr(source.module, source.attribute))


class _Place(NamedTuple):
    """Where a parameter or buffer is registered."""

    module: nn.Module
    attribute: str
    name: str


def _ties(part: nn.Module) -> list[list[_Place]]:
    """The places of each parameter or buffer that is registered more than once: a tie.

    Assigning a state dict gives each name a tensor of its own, so ties must be made again afterwards.
    """
    places: dict[int, list[_Place]] = {}
    for prefix, module in part.named_modules():
        for attribute, tensor in _registered(module):
            name = f"{prefix}.{attribute}" if prefix else attribute
            places.setdefault(id(tensor), []).append(_Place(module, attribute, name))
    return [group for group in places.values() if len(group) > 1]


def _registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own parameters and buffers with their names; a tensor with two names comes twice."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def meta_twins(part: nn.Module) -> None:
    """Replace every parameter by one of the same shape on the meta device; ties are kept, buffers are left alone."""
    _replace_parameters(part, "meta")


def empty_parameters(part: nn.Module, device: str | torch.device = "cpu") -> None:
    """Replace every parameter by one of the same shape without values; on the CPU it takes no memory yet."""
    _replace_parameters(part, device)


def _replace_parameters(part: nn.Module, device: str | torch.device) -> None:
    twins: dict[int, nn.Parameter] = {}
    for module in part.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in twins:
                twins[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
                )
            setattr(module, attribute, twins[id(parameter)])
