"""What published formats of our own loaders share: names of keys, folders in, folders out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, save_torch_state_dict
from torch import Tensor

from lit_vlm.core.batch import Batch
from lit_vlm.core.part import load_state
from lit_vlm.core.pretrained import resolve, shortened
from lit_vlm.core.safetensors import read_folder, read_json
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
        family: for messages.
        dropped: part of a key → why such keys are left out.
        slots: beginning of a published key → (slot, what stands there in that slot's own names); the first that fits.
        rename: what else changes, from published to own names.
        restore: the way back.
        split: what changes in the published weights themselves, before names: several in one matrix, taken apart.
        join: the way back, after names.
        whole: name of a part that `split` made → that of the published weight.
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
        """Weights by slot, under its own names; `config` is the published one.

        Raises:
            ValueError: for a key that belongs nowhere.
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
        """The same without beginnings for which these keys use another one."""
        used = {next((begin for begin in self.slots if key.startswith(begin)), None) for key in state}
        taken = {self.slots[begin] for begin in used if begin is not None}
        slots = {begin: place for begin, place in self.slots.items() if begin in used or place not in taken}
        return replace(self, slots=slots)

    def published(self, slot: str, name: str) -> str:
        """The published key of a weight."""
        for begin, (other, own) in self.slots.items():
            if slot == other and name.startswith(own):
                return begin + self.restore(name.removeprefix(own))
        raise ValueError(f"the family {self.family} has no name for {slot}.{name}")

    def shown(self, slot: str, name: str) -> str:
        """For messages: the key in the files that gives a weight; of one that the family lacks, its own name."""
        try:
            return self.whole(self.published(slot, name))
        except ValueError:
            return name


@dataclass(frozen=True)
class Layout:
    """A published model before it is built.

    Attributes:
        config: what its config.json says.
        slots: its weights.
        tokenizer: its folder or hub name, or None for a bare state dict.
        names: of the family.
    """

    config: Mapping[str, Any]
    slots: SlotStates
    tokenizer: str | None
    names: Names

    def weight(self, slot: str, name: str, dims: int) -> Tensor:
        """A weight whose shape says how large the model is.

        Raises:
            ValueError: where it is absent, or has another number of dimensions, with its published key.
        """
        found, key = self.slots.get(slot, {}).get(name), self.names.shown(slot, name)
        if found is None:
            raise ValueError(f"there is no '{key}'")
        if found.ndim != dims:
            raise ValueError(f"'{key}' is {tuple(found.shape)}, not of {dims} dimensions")
        return found

    def setting(self, key: str, found: int) -> int:
        """What config.json says of a size that a weight shows too; what the weight shows where it says nothing."""
        return int(self.config.get(key) or found)

    def decoder_config(self, model_type: str) -> dict[str, Any]:
        """The configuration under the name that transformers knows the decoder by."""
        plain = {key: value for key, value in self.config.items() if key != "architectures"}
        return checked_sizes(plain, "config.json") | {"model_type": model_type}


def checked_sizes(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A decoder's configuration that says how large it is: transformers would take another model's sizes in silence.

    Raises:
        ValueError: for a size that is absent, naming it.
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
        ValueError: where weights and model do not fit, naming the slot and the keys.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise ValueError("a state dict says nothing of heads and layers: pass config as well")
        state, folder = source, None
    else:
        folder = resolve(str(source))
        config, state = config or read_config(folder), read_folder(folder)
    layout = Layout(config, names.slots_of(state, config), folder, names.seen_in(state))
    return load_layout(layout, architecture, layout.config)


def load_layout(layout: Layout, architecture: Callable[[Layout], VLM], language: Mapping[str, Any]) -> VLM:
    """Build a model and load the weights of its slots; raises as `load_folder` does.

    Args:
        layout: what was read.
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
    """Load the weights of all slots but heads.

    Args:
        model: its parameters may be on the meta device.
        slots: weights by slot, under its own names.
        shown: slot and own name → the published key.

    Raises:
        ValueError: where weights are missing, have another shape or are not of the model, with their published keys.
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
    """The published configuration of a folder or hub repository.

    Raises:
        ValueError: when a folder has none, or it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        path = Path(hf_hub_download(folder, "config.json"))
    return read_json(path)


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
        config: what config.json shall say.
        names: of the family.
        heads: own slot → the family's slot, of heads that are written too.
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
    """Make a folder; raises ValueError if it is there and holds anything."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def published_state(model: VLM, names: Names, heads: Mapping[str, str]) -> dict[str, Tensor]:
    """All weights under published names; of heads only those that `heads` names."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        slot, name = key.split(".", 1)
        if slot == "heads":
            slot, name = f"heads.{name.split('.', 1)[0]}", name.split(".", 1)[1]
            if slot not in heads:
                continue
        state[names.published(heads.get(slot, slot), name)] = value.detach().contiguous()
    return state


def check_written(model: VLM, out: Path, load: Callable[[Path], VLM]) -> float:
    """The largest difference of the logits between a model and what was written of it; raises if it is too large."""
    batch = trial_batch(model)
    with torch.no_grad():
        difference = float((model.logits(batch) - load(out).logits(batch)).abs().max())
    if not difference <= TOLERANCE:
        raise ValueError(f"the exported model's logits differ by {difference:.2e}, more than {TOLERANCE:g}: {out}")
    return difference


def trial_batch(model: VLM) -> Batch:
    """A random picture in the middle of random text."""
    generator = torch.Generator().manual_seed(0)
    side = model.encoder.pixels.size or 3 * model.encoder.pixels.multiple
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    grid = model.grid_map(model.encoder.patch_grid(side, side))
    text = torch.randint(1, model.decoder.vocab_size, (12,), generator=generator).tolist()
    ids = [*text[:4], *[0] * grid.num_tokens, *text[4:]]
    return collate([Sample("probe", "probe", ids, ids, image_starts=[4], grids=[grid], images=[image])])
