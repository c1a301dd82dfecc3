"""From the factories of a recipe to a model with weights."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from lit_vlm.core.lora import (
    ADAPTED,
    NO_ADAPTERS,
    Adapters,
    add_adapters,
    check_adapters,
    has_adapters,
    load_adapters,
    split_state,
)
from lit_vlm.core.part import Part, StateDict, check_state, load_state, meta_parameters
from lit_vlm.core.quantised import UNQUANTISED, Quantize, quantise
from lit_vlm.decoders import Decoder, HFDecoder
from lit_vlm.embedders import Embedder
from lit_vlm.encoders import Encoder
from lit_vlm.heads import Head
from lit_vlm.model.bases import SavedSlots
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Projector

P = TypeVar("P", bound=Part)


@dataclass
class Slots:
    """One factory per slot; widths of neighbours come in as arguments.

    Attributes:
        encoder: () → encoder.
        projector: (encoder's width, decoder's width) → projector.
        embedder: (decoder's width, rows of its word table) → embedder.
        decoder: () → decoder.
        heads: name → (decoder's width, its number of blocks) → head; None for a head that a config removes.
        lora: low-rank adapters of slots.
        quantize: types in which frozen weights are stored while a stage trains.
    """

    encoder: Callable[[], Encoder]
    projector: Callable[[int, int], Projector]
    embedder: Callable[[int, int], Embedder]
    decoder: Callable[[], Decoder]
    heads: Mapping[str, Callable[[int, int], Head] | None] = field(default_factory=dict)
    lora: Adapters = NO_ADAPTERS
    quantize: Quantize = UNQUANTISED

    @property
    def removed_heads(self) -> list[str]:
        """Names of the heads that are set to null."""
        return [name for name, factory in self.heads.items() if factory is None]

    def adapted(self, slot: str, part: P) -> P:
        """A part with the adapters of its slot on it, which change nothing yet.

        Args:
            slot: the slot's name.
            part: a part without adapters, which gets them; where it has parameters on the meta device, so have they.

        Raises:
            ValueError: for adapters that a decoder's own argument asks for too; and as `add_adapters`.
        """
        lora, key = getattr(self.lora, slot), f"model.lora.{slot}"
        own = part.lora if isinstance(part, HFDecoder) else None
        if lora is not None and own is not None:
            raise ValueError(f"{key} and model.decoder.init_args.lora both ask for adapters: set the second to null")
        if own is not None:
            lora, key = own, "model.decoder.init_args.lora"
        if lora is None:
            return part
        on_meta = any(parameter.is_meta for parameter in part.parameters())
        with meta_parameters() if on_meta else nullcontext(), _seeded(key):
            add_adapters(part, lora, key)
        return part

    def assemble(self, make: Callable[[str, Callable[[], Part]], Part]) -> VLM:
        """Build all parts and put them together, in an order in which widths are known; adapters are not put on yet.

        Args:
            make: called as `make(name, factory)` for each part, with `encoder`, `heads.NAME` and so on; returns the
                part.

        Raises:
            ValueError: by the constructors of parts; for a head, naming it, also where it reads what model or embedder
                lacks.
        """
        decoder = make("decoder", self.decoder)
        assert isinstance(decoder, Decoder)
        encoder = make("encoder", self.encoder)
        assert isinstance(encoder, Encoder)
        projector = make("projector", lambda: self.projector(encoder.width, decoder.width))
        embedder = make("embedder", lambda: self.embedder(decoder.width, decoder.vocab_size))
        heads = {
            name: make(f"heads.{name}", partial(_head, name, factory, decoder.width, decoder.num_layers))
            for name, factory in self.heads.items()
            if factory is not None
        }
        return VLM(encoder, projector, embedder, decoder, heads)  # type: ignore[arg-type]


def _head(name: str, factory: Callable[[int, int], Head], width: int, num_layers: int) -> Head:
    """Build a head; its errors name it, as there may be several heads of one class."""
    try:
        head = factory(width, num_layers)
    except ValueError as error:
        raise ValueError(f"model.heads.{name}: {error}") from error
    if wrong := [tap for tap in head.taps if isinstance(tap, int) and tap > num_layers]:
        raise ValueError(f"model.heads.{name} reads layer {wrong[0]}; this decoder has layers 0 to {num_layers}")
    return head


def build_on_meta(slots: Slots) -> VLM:
    """The architecture without any weights: to check a recipe, and on all ranks but the first of sharded training.

    Raises:
        ValueError: as `Slots.assemble`.
    """
    with meta_parameters():
        model = slots.assemble(lambda _name, factory: factory())
    for slot in ADAPTED:
        slots.adapted(slot, model.slots()[slot][0])
    return model


def build(
    slots: Slots,
    saved: Mapping[str, StateDict] | None = None,
    fresh: tuple[str, ...] = (),
    only: Collection[str] | None = None,
    origin: str = "the saved state",
) -> VLM:
    """The model with its weights, on the CPU.

    Args:
        slots: the factories.
        saved: weights that an earlier stage left, by slot (`heads.NAME` for heads); they take the place of pretrained
            ones. None: there are none.
        fresh: slots that start anew, whatever `saved` holds.
        only: parts that are wanted, such as `encoder` or `heads.NAME`; the others stay without weights. Default: all.
        origin: where `saved` was read, for messages.

    Raises:
        ValueError: where weights are missing or do not fit a slot; and as `Slots.assemble`.
    """
    drawn: set[str] = set()
    origins: dict[str, bool] = {}
    bases = saved.bases if isinstance(saved, SavedSlots) else {}
    adapters: dict[str, StateDict] = {}

    def make(name: str, factory: Callable[[], P]) -> P:
        slot = name.split(".")[0]
        with meta_parameters():
            part = factory()
        if only is not None and name not in only:
            return part
        state: StateDict | None
        if saved is not None and slot not in fresh:
            state, adapters[name] = _saved_state(name, part, saved, origin)
            origins[name] = True
            if name in bases:
                state = bases[name].whole(part, state)
                bases[name].check(state)
        else:
            state = part.pretrained_state()
            origins[name] = False
        if state is None:
            drawn.add(name)
            del origins[name]
            with _seeded(name):
                return factory()
        load_state(part, state, name)
        return part

    model = slots.assemble(make)
    model.drawn, model.origins = frozenset(drawn), origins
    anew = saved is None or "embedder" in fresh
    if anew and (only is None or {"embedder", "decoder"} <= set(only)):
        model.embedder.adopt(model.decoder)
        if model.embedder.adopts_all:
            model.drawn -= {"embedder"}
    for slot in ADAPTED:
        part = slots.adapted(slot, model.slots()[slot][0])
        load_adapters(part, adapters.get(slot, {}), slot, origin)
    return model


def check_saved(model: VLM, slots: Slots, saved: Mapping[str, StateDict], fresh: Collection[str], origin: str) -> None:
    """Check that saved weights fit a model, by names and shapes: nothing is loaded, and both may be on the meta device.

    Args:
        model: the model that is to start from the weights.
        slots: the factories that it was built with.
        saved: weights by slot, as for `build`.
        fresh: slots that start anew, whatever `saved` holds.
        origin: where the weights were read, for messages.

    Raises:
        ValueError: naming the slot that the weights do not fit, and what differs.
    """
    plain = model
    if any(has_adapters(part) for parts in model.slots().values() for part in parts):
        with meta_parameters():
            plain = slots.assemble(lambda _name, factory: factory())
    parts: dict[str, tuple[Part, Part]] = {
        slot: (parts[0], model.slots()[slot][0]) for slot, parts in plain.slots().items() if slot != "heads"
    }
    parts |= {f"heads.{name}": (head, head) for name, head in plain.heads.items() if isinstance(head, Part)}
    for name, (part, adapted) in parts.items():
        if name.split(".")[0] not in fresh:
            try:
                state, adapters = _saved_state(name, part, saved, origin)
                if isinstance(saved, SavedSlots) and name in saved.bases and saved.bases[name].pretrained:
                    part.find_pretrained()
                    state = part.state_dict() | state
                check_state(part, state, name)
                check_adapters(adapted, adapters, name, origin)
            except ValueError as error:
                said = str(error) if str(error).startswith(origin) else f"{origin}: {error}"
                raise ValueError(f"model.stage.start_from: {said}") from error


def _saved_state(name: str, part: Part, saved: Mapping[str, StateDict], origin: str) -> tuple[StateDict, StateDict]:
    """The saved weights of a slot, under the names of the part that is in the slot now, and its saved adapters."""
    if name not in saved and part.state_dict():
        raise ValueError(
            f"{origin} has no weights for the slot '{name}', only for {sorted(saved)}. "
            f"If this part is meant to start anew, add '{name.split('.')[0]}' to model.stage.fresh."
        )
    state, adapters = split_state(saved.get(name, {}))
    return part.adapt_state(state), adapters


def quantise_slots(model: VLM, quantize: Quantize, device: torch.device | None = None) -> None:
    """Store frozen weights of slots in 4 or 8 bits, in place; arguments and errors as for `quantised.quantise`."""
    for slot, kind in quantize.kinds().items():
        quantise(model.slots()[slot][0], kind, slot, device)


def load_teachers(model: VLM, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
    """Read the weights of heads' teachers, so that a missing file is seen before the first step.

    Every process has teachers of its own, sharded or not, as they are no part of the model.

    Args:
        model: the model.
        names: heads whose teachers are wanted.
        dtype: the type of autocast, where teachers are to store what it rounds in it.

    Raises:
        ValueError: naming the head, where weights are missing, do not fit, or are beyond the range of `dtype`.
    """
    for name in names:
        head = model.heads[name]
        if not isinstance(head, Head) or head.teacher is None:
            continue
        try:
            head.teacher.load()
            if dtype is not None:
                head.teacher.narrow(dtype)
        except (ValueError, OSError) as error:
            raise ValueError(f"model.heads.{name}.teacher: {error}") from error


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Draw random weights from a seed of the slot's own, so that swapping a part leaves the others' start the same."""
    seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        yield
