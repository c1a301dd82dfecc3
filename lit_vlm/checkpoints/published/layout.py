"""What families without a loader in transformers share: names of keys, reading and writing of folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.core.part import load_state
from lit_vlm.core.pretrained import resolve, shortened
from lit_vlm.core.safetensors import read_folder, read_json
from lit_vlm.core.written import check_new_folder
from lit_vlm.data.sample.collate import collate
from lit_vlm.data.sample.encode import Sample
from lit_vlm.model.vlm import VLM

SlotStates = dict[str, dict[str, Tensor]]
TOLERANCE = 1e-5
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LOADED = ("encoder", "projector", "embedder", "decoder")


Rearrange = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]]


def _same(name: str) -> str:
    return name


def _as_it_is(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mapping[str, Tensor]:
    return state


@dataclass(frozen=True)
class Names:
    """How a family names its weights.

    Attributes:
        family: name of the family, for messages.
        dropped: substring of a published key → why such keys are left out.
        slots: beginning of a published key → (slot, the beginning that replaces it in the slot's own names); the first
            beginning that fits counts.
        rename: changes the rest of a published name to our own name.
        restore: the inverse of `rename`.
        split: changes the published weights before they are renamed, such as one matrix that is taken apart.
        join: the inverse of `split`, after names are published ones again.
        whole: name of a weight that `split` made → name of the published weight that it was taken from.
    """

    family: str
    dropped: Mapping[str, str]
    slots: Mapping[str, tuple[str, str]]
    rename: Callable[[str], str] = _same
    restore: Callable[[str], str] = _same
    split: Rearrange = _as_it_is
    join: Rearrange = _as_it_is
    whole: Callable[[str], str] = _same

    def slots_of(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> SlotStates:
        """Published weights by slot, under the slot's own names; `config` is the published configuration.

        Raises:
            ValueError: for a key that belongs to no slot.
        """
        slots: SlotStates = {}
        for key, value in self.split(state, config).items():
            if any(part in key for part in self.dropped):
                continue
            for begin, (slot, own) in self.slots.items():
                if key.startswith(begin):
                    slots.setdefault(slot, {})[self.rename(own + key.removeprefix(begin))] = value
                    break
            else:
                raise ValueError(f"'{key}' is no key of the family {self.family}")
        return slots

    def seen_in(self, state: Iterable[str]) -> Names:
        """These names without each beginning in `slots` for whose place the keys `state` use another beginning."""
        used = {next((begin for begin in self.slots if key.startswith(begin)), None) for key in state}
        taken = {self.slots[begin] for begin in used if begin is not None}
        slots = {begin: place for begin, place in self.slots.items() if begin in used or place not in taken}
        return replace(self, slots=slots)

    def published(self, slot: str, name: str) -> str:
        """The published key of a weight.

        Raises:
            ValueError: for a weight that the family does not publish.
        """
        for begin, (other, own) in self.slots.items():
            if slot == other and name.startswith(own):
                return begin + self.restore(name.removeprefix(own))
        raise ValueError(f"the family {self.family} has no name for {slot}.{name}")

    def shown(self, slot: str, name: str) -> str:
        """The key in the files that a weight is read from, for messages; its own name where the family has no key."""
        try:
            return self.whole(self.published(slot, name))
        except ValueError:
            return name


@dataclass(frozen=True)
class Layout:
    """A published model before it is built.

    Attributes:
        config: its config.json.
        slots: its weights by slot.
        tokenizer: folder or hub name of the tokenizer; None for a bare state dict.
        names: the family's names.
    """

    config: Mapping[str, Any]
    slots: SlotStates
    tokenizer: str | None
    names: Names

    def weight(self, slot: str, name: str, dims: int) -> Tensor:
        """A weight whose shape tells a size of the model.

        Raises:
            ValueError: where the weight is absent or has not `dims` dimensions, naming its published key.
        """
        found, key = self.slots.get(slot, {}).get(name), self.names.shown(slot, name)
        if found is None:
            raise ValueError(f"there is no '{key}'")
        if found.ndim != dims:
            raise ValueError(f"'{key}' is {tuple(found.shape)}, not of {dims} dimensions")
        return found

    def setting(self, key: str, found: int) -> int:
        """A size from config.json; `found`, the size of a weight, where config.json does not have `key`."""
        return int(self.config.get(key) or found)

    def decoder_config(self, model_type: str) -> dict[str, Any]:
        """The decoder's configuration with transformers' `model_type` for it; raises as `checked_sizes` does."""
        plain = {key: value for key, value in self.config.items() if key != "architectures"}
        return checked_sizes(plain, "config.json") | {"model_type": model_type}


def checked_sizes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A decoder's configuration that has all sizes: transformers would silently fill in those of another model.

    Raises:
        ValueError: for an absent size, naming it.
    """
    if absent := [key for key in SIZES if config.get(key) is None]:
        raise ValueError(f"{name} lacks {', '.join(absent)}, sizes of the decoder")
    return dict(config)


def load_folder(
    source: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    names: Names,
    architecture: Callable[[Layout], VLM],
) -> VLM:
    """Build a model and load its weights; heads are left out.

    Raises:
        ValueError: for a state dict without configuration, a key that belongs to no slot, an absent size, or weights
            that do not fit the model, naming the slot and the keys.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("a state dict says nothing of attention heads and layers: pass config as well")
        state, folder = source, None
    else:
        folder = resolve(str(source))
        config, state = config or read_config(folder), read_folder(folder)
    layout = Layout(config, names.slots_of(state, config), folder, names.seen_in(state))
    return load_layout(layout, architecture, layout.config)


def load_layout(layout: Layout, architecture: Callable[[Layout], VLM], language: Mapping[str, Any]) -> VLM:
    """Build a model and load the weights of its slots; raises as `load_folder` does.

    Args:
        layout: what was read from the folder or state dict.
        architecture: builds the model, its parameters on the meta device.
        language: the part of the configuration that is the decoder's.
    """
    decoder = layout.slots.setdefault("decoder", {})
    if language.get("tie_word_embeddings") and "lm.lm_head.weight" not in decoder:
        decoder["lm.lm_head.weight"] = layout.weight("decoder", "lm.model.embed_tokens.weight", 2)
    model = architecture(layout)
    fill(model, layout.slots, layout.names.shown)
    return model.eval()


def fill(model: VLM, slots: SlotStates, shown: Callable[[str, str], str]) -> None:
    """Load the weights of all slots except heads.

    Args:
        model: its parameters may be on the meta device.
        slots: weights by slot, under the slot's own names.
        shown: slot and own name → the published key.

    Raises:
        ValueError: for weights that are missing, of another shape or not of the model, naming their published keys.
    """
    for slot in LOADED:
        part, state = getattr(model, slot), slots.get(slot, {})
        own = part.state_dict()

        def named(name: str, slot: str = slot) -> str:
            return name if (key := shown(slot, name)) == name else f"{name} ({key})"

        problems = {
            "missing": [named(name) for name in own if name not in state],
            "not of this part": [named(name) for name in state if name not in own],
            "other shape": [
                f"{named(name)} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in state and state[name].shape != value.shape
            ],
        }
        if any(problems.values()):
            listed = "; ".join(f"{title}: {shortened(names)}" for title, names in problems.items() if names)
            raise ValueError(f"slot '{slot}' ({type(part).__name__}): {listed}")
        load_state(part, state, slot)


def read_config(folder: str) -> dict[str, Any]:
    """The published configuration of a folder.

    Raises:
        ValueError: when the folder has no config.json, or one that is no JSON object.
    """
    return read_json(Path(folder) / "config.json")


def export_folder(
    model: VLM,
    out: Path,
    config: Mapping[str, Any],
    names: Names,
    heads: Mapping[str, str],
    load: Callable[[Path], VLM],
) -> float:
    """Write weights, configuration and tokenizer, read them back, and compare logits.

    Args:
        model: what to write.
        out: a folder that is new or empty.
        config: what is written to config.json.
        names: the family's names.
        heads: our slot → the family's slot, for each head that is written.
        load: the family's `load`.

    Returns:
        the largest difference of the logits on a random picture and text, in fp32.

    Raises:
        ValueError: when the folder is not empty, or the logits differ.
    """
    new_folder(out)
    model.float().eval()
    state = published_state(model, names, heads)
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    save_torch_state_dict(dict(names.join(state, config)), out)
    write_config(out, config)
    model.decoder.tokenizer.save_pretrained(out)
    return check_written(model, out, load)


def new_folder(out: Path) -> None:
    """Make a folder.

    Raises:
        ValueError: as `check_new_folder`.
    """
    check_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config` to config.json in a folder."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def published_state(model: VLM, names: Names, heads: Mapping[str, str]) -> dict[str, Tensor]:
    """All weights of a model under published names, with those heads only that `heads` names.

    Raises:
        ValueError: for a weight that the family does not publish.
    """
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        slot, name = key.split(".", 1)
        if slot == "heads":
            slot, name = f"heads.{name.split('.', 1)[0]}", name.split(".", 1)[1]
            if slot not in heads:
                continue
        state[names.published(heads.get(slot, slot), name)] = value.detach().contiguous()
    return state


def difference_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a logit; a share of the largest logit if that is above 1, as rounding grows with it."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def check_written(model: VLM, out: Path, load: Callable[[Path], VLM]) -> float:
    """The largest difference of the logits, in fp32, between a model and the one that `load` reads from `out`.

    Raises:
        ValueError: if the difference is above `TOLERANCE`.
    """
    batch = trial_batch(model)
    with torch.no_grad():
        difference = difference_of(load(out).logits(batch), model.logits(batch))
    if not difference <= TOLERANCE:
        raise ValueError(f"the exported model's logits differ by {difference:.2e}, more than {TOLERANCE:g}: {out}")
    return difference


def trial_batch(model: VLM) -> Batch:
    """A batch of one sample: a random picture in the middle of random text."""
    generator = torch.Generator().manual_seed(0)
    side = model.encoder.pixels.size or 3 * model.encoder.pixels.multiple
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    grid = model.grid_map(model.encoder.patch_grid(side, side))
    text = torch.randint(1, model.decoder.vocab_size, (12,), generator=generator).tolist()
    ids = [*text[:4], *[0] * grid.num_tokens, *text[4:]]
    return collate([Sample("probe", "probe", ids, ids, image_starts=[4], grids=[grid], images=[image])])
