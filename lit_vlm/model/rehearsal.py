"""A step without arithmetic: one batch runs forward and backward through weights that have shapes and no values.

So each part meets what its neighbours really hand over, at full size, in seconds and on any machine, and an error names
the slot that does not fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_vlm.core.batch import Batch, Images, VisualTokens
from lit_vlm.core.part import meta_parameters
from lit_vlm.decoders import DecoderOutput
from lit_vlm.heads import Head
from lit_vlm.model.vlm import VLM
from lit_vlm.teachers import EncoderTeacher, Teacher


class _Misfit(ValueError):
    """The output of a part differs from what its attributes promise; the message already names slot and class."""


class _WithoutValues(FakeTensorMode):
    """Tensors of a rehearsal.

    Whether there is a GPU is asked once: PyTorch would ask for every operation, and without one looks for the driver's
    library each time.
    """

    @cached_property
    def avoid_device_init(self) -> bool:
        return super().avoid_device_init


def rehearse(model: VLM, batch: Batch, losses: Mapping[str, float]) -> None:
    """Run a batch forward and backward, and check that every part keeps its contract.

    Args:
        model: built on the meta device, with frozen what a stage does not train. Its parameters are replaced by ones
            without values, so it is of no use afterwards.
        batch: what the collator made; teachers' images are enough, and features are filled in.
        losses: loss → its weight.

    Raises:
        ValueError: naming the slot, its class, what it was given and the way out.
        NotImplementedError: where PyTorch lacks a kernel for the CPU, which says nothing of other devices.
    """
    mode = _WithoutValues(allow_non_fake_inputs=True)
    _without_values(model, mode)
    _with_targets(model, batch, losses, mode)
    watch = _Watch(model)
    try:
        sums = model(batch, losses)
        total = torch.stack([losses[name] * value for name, value in sums.items()]).sum()
        watch.at = ["backward"]
        if total.requires_grad:
            total.backward()
    except (_Misfit, NotImplementedError):
        raise
    except Exception as error:  # any part may raise anything, those of users too
        raise ValueError(watch.blame(error)) from error
    finally:
        watch.end()


def _without_values(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter by one of the same shape and type that holds nothing; ties are kept."""
    twins: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in twins:
                with mode:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                twins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(part, name, twins[id(parameter)])


def _with_targets(model: VLM, batch: Batch, losses: Mapping[str, float], mode: FakeTensorMode) -> None:
    """Put features without values into the batch where a teacher would compute them."""
    for name, head in model.heads.items():
        given = batch.teacher_images.get(name)
        if not (losses.get(name) and isinstance(head, Head) and head.teacher is not None) or given is None:
            continue
        try:
            batch.prepared[name] = _features(head.teacher, given, mode)
        except Exception as error:
            raise ValueError(
                f"model.heads.{name}: its teacher {type(head.teacher).__name__} fails on pictures of "
                f"{_sizes(given)} pixels: {_reason(error)}"
            ) from error


def _features(teacher: Teacher, images: Images, mode: FakeTensorMode) -> VisualTokens:
    """The teacher's features of images: without values for an encoder, real ones for a teacher without weights."""
    if not isinstance(teacher, EncoderTeacher):
        return teacher(images)
    twin = copy.copy(teacher)
    with meta_parameters():
        twin.encoder = teacher.network()().eval()
    _without_values(twin.encoder, mode)
    twin._device = torch.device("cpu")  # marks the weights as read, as there are no values to read
    return twin(images)


class _Watch:
    """Hooks that keep track of the slot that runs, and check the output of each slot.

    Args:
        model: the model whose slots are watched.
    """

    def __init__(self, model: VLM) -> None:
        self.model = model
        self.at: list[str] = []
        self.given = ""
        checks: dict[str, tuple[nn.Module, Callable[[Any, Any], None]]] = {
            "encoder": (model.encoder, self._encoded),
            "projector": (model.projector, self._projected),
            "embedder": (model.embedder, self._embedded),
            "decoder": (model.decoder, self._decoded),
        }
        # A head checks what it gives by itself (`Head.forward`).
        checks |= {f"heads.{name}": (head, _unchecked) for name, head in model.heads.items()}
        self._handles = []
        for slot, (part, check) in checks.items():
            self._handles.append(part.register_forward_pre_hook(self._enter(slot)))
            self._handles.append(part.register_forward_hook(self._leave(check)))

    def _enter(self, slot: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.at.append(slot)
            self.given = ", ".join(_described(one) for one in arguments if _described(one))

        return hook

    def _leave(self, check: Callable[[Any, Any], None]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            check(arguments[0], output)
            self.at.pop()

        return hook

    def end(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def blame(self, error: Exception) -> str:
        """The message of an error: which slot failed, on which input, and why."""
        if not self.at:
            return f"the step fails between two slots: {_reason(error)}"
        slot = self.at[-1]
        if slot == "backward":
            return f"the backward pass fails: {_reason(error)}"
        part = self.model.get_submodule(slot)
        way_out = {
            "encoder": "; choose a data.transform that makes pictures of the size it takes, or set its size",
            "projector": f"; it is built for the encoder's width, {self.model.encoder.width}, its first argument",
        }.get(slot, "")
        given = self.given or "its input"
        return f"model.{slot} ({type(part).__name__}) fails on {given}: {_reason(error)}{way_out}"

    def _refuse(self, slot: str, problem: str) -> None:
        raise _Misfit(f"model.{slot} ({type(self.model.get_submodule(slot)).__name__}) {problem}")

    def _encoded(self, images: Images, tokens: VisualTokens) -> None:
        encoder = self.model.encoder
        if tokens.features.shape[-1] != encoder.width:
            self._refuse(
                "encoder",
                f"gives features of width {tokens.features.shape[-1]}, and its attribute width says {encoder.width}, "
                "which model.projector is built for: make the two the same",
            )
        expected = tuple(encoder.patch_grid(*size) for size in images.sizes)
        if tuple(tokens.grids) != expected:
            self._refuse(
                "encoder",
                f"gives the layouts {list(tokens.grids)[:2]} for pictures of {_sizes(images)} pixels, and its "
                f"patch_grid says {list(expected)[:2]}: make the two the same",
            )

    def _projected(self, given: VisualTokens, tokens: VisualTokens) -> None:
        width, wanted = tokens.features.shape[-1], self.model.decoder.width
        if width != wanted:
            self._refuse(
                "projector",
                f"gives tokens of width {width}, and model.decoder ({type(self.model.decoder).__name__}) takes "
                f"{wanted}: build its last layer from the second argument of its constructor, the decoder's width"
                + (", or take MLP or Linear" if width == self.model.encoder.width else ""),
            )
        expected = tuple(self.model.projector.grid_map(grid) for grid in given.grids)
        if tuple(tokens.grids) != expected:
            self._refuse(
                "projector",
                f"gives the layouts {list(tokens.grids)[:2]}, and its grid_map says {list(expected)[:2]}: make the two "
                "the same",
            )

    def _embedded(self, batch: Batch, embeds: Tensor) -> None:
        expected = (*batch.input_ids.shape, self.model.decoder.width)
        if tuple(embeds.shape) != expected:
            self._refuse("embedder", f"gives vectors {list(embeds.shape)}; model.decoder takes {list(expected)}")

    def _decoded(self, embeds: Tensor, output: DecoderOutput) -> None:
        if output.hidden.shape != embeds.shape:
            self._refuse("decoder", f"gives states {list(output.hidden.shape)} for inputs {list(embeds.shape)}")


def _unchecked(_given: Any, _output: Any) -> None:
    """For a part that checks its output by itself."""


def _described(thing: Any) -> str:
    if isinstance(thing, Images):
        return f"pictures of {_sizes(thing)} pixels (width × height)"
    if isinstance(thing, VisualTokens):
        return f"features {list(thing.features.shape)}"
    if isinstance(thing, Tensor):
        return f"a tensor {list(thing.shape)}"
    return ""


def _sizes(images: Images) -> str:
    found = list(dict.fromkeys(f"{width} × {height}" for height, width in images.sizes))
    return ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")


def _reason(error: Exception) -> str:
    """The first line of an error, with its class in front unless it is a ValueError."""
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}"
