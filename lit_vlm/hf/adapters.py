"""Adapters of a run as a folder of PEFT, on a base that is a folder of transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm.core.lora import adapted_layers, is_adapter, split_state
from lit_vlm.core.pretrained import is_hub_name, resolve, shortened
from lit_vlm.core.safetensors import read_json
from lit_vlm.core.written import check_new_folder, whole_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.hf.compare import Differences, compare
from lit_vlm.hf.config import SLOTS, LitVLMConfig
from lit_vlm.hf.export import export_hf, make_processor
from lit_vlm.hf.model import LitVLMForConditionalGeneration
from lit_vlm.model.vlm import VLM

BASE, IDENTITY = "base", "base.json"
"""Folder of a base that is written with its adapters, and the file that says which base they are of: `base` is its
folder or hub name, null for the one beside it."""
INNER = "model.vlm."
"""Where an exported model has the slots."""


@dataclass(frozen=True)
class Adapted:
    """What was written beside adapters.

    Attributes:
        differences: of the model that was read back.
        whole: slots, and modules beside adapters, that are written whole, as the base has other weights there.
        parameters: number of parameters of the adapters and of these.
    """

    differences: Differences
    whole: tuple[str, ...]
    parameters: int


def export_adapters(
    model: VLM, config: Mapping[str, Any], written: SampleFormat, spec: InputSpec, out: Path, base: str | None
) -> Adapted:
    """Write a run's adapters as PEFT reads them, read them back on their base, and compare with the kit's model.

    Args:
        model: with adapters on some slots; loses its heads and is put into eval mode and fp32, in place, and gets the
            base's weights where these are its own, rounded.
        config: the config of its run.
        written: template, transform and `max_length` of its data.
        spec: what the data side knows of it.
        out: a folder that is new or empty.
        base: a folder or hub name of an exported model (`hf`) with the weights under the adapters; where there are no
            adapters it may have others, which are then written whole. None: the base is written, into `out/base`.

    Raises:
        ValueError: for a model without adapters, a base of other parts, or with other weights under the adapters, and
            as `export_hf`.
    """
    check_new_folder(out)
    if not any(is_adapter(name) for name in model.state_dict()):
        raise ValueError(
            "this run has no adapters (model.lora of all slots is null): --format hf writes the whole model"
        )
    rounded = {slot: kind for slot, kind in (config["model"].get("quantize") or {}).items() if kind}
    if base is not None:
        check_base(base)
        if rounded:
            raise ValueError(
                f"this run trained its adapters on weights that were rounded (model.quantize: {rounded}), which no "
                "exported base has: leave --base out, and they are written as well"
            )
    model.heads = nn.ModuleDict()
    model.float().eval()
    folder = None if base is None else Path(resolve(base))
    loaded = None if folder is None else _opened(folder, torch.float32).eval()
    with whole_folder(out) as scratch:
        if folder is None or loaded is None:
            folder = scratch / BASE
            with _without_adapters(model):
                export_hf(model, config, written, spec, folder)
            loaded = _opened(folder, torch.float32).eval()
        whole = _check_weights(model, loaded, base or BASE)
        adapted = _wrapped(model, loaded, whole)
        name = None if base is None else base if is_hub_name(base) else str(Path(base).expanduser().resolve())
        adapted.peft_config["default"].base_model_name_or_path = name or BASE
        # PEFT would ask the hub whether the base's word table has grown.
        adapted.save_pretrained(scratch, save_embedding_layers=False)
        make_processor(model, config, written, spec).save_pretrained(scratch)
        identity = {"base": name} | _identity(folder)
        (scratch / IDENTITY).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        del loaded, adapted
        found = load_adapted(scratch).eval()
        differences = compare(model, written, spec, found, _projector(found), scratch)
        return Adapted(differences, whole, sum(p.numel() for p in found.parameters() if p.requires_grad))


def load_adapted(source: str | Path, base: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Exported adapters on their base, as a `peft.PeftModel` whose adapters train.

    Args:
        source: a folder, or the name of a model on the hub, that `lit-vlm export --format peft` wrote.
        base: folder or hub name of the base; default: where it was when the adapters were written.
        dtype: type of the base's weights.

    Raises:
        ValueError: for a folder without adapters, a base that is not there, or whose weights are others than those
            that the adapters were trained on.
    """
    from peft import PeftModel

    folder = Path(resolve(str(source), folders=("", BASE)))
    identity = read_json(folder / IDENTITY)
    name = identity["base"] if base is None else base
    place = folder / BASE if name is None else Path(resolve(name))
    if not place.is_dir():
        raise ValueError(f"the base of {source} is not there: {place}; give another place of it")
    found = _identity(place)
    if differing := [what for what, value in found.items() if identity.get(what) != value]:
        raise ValueError(
            f"{place} is not the base of {source}: its {' and '.join(differing)} are others than those that the "
            "adapters were trained on"
        )
    return PeftModel.from_pretrained(_opened(place, dtype), str(folder), is_trainable=True)


def check_base(base: str) -> None:
    """Refuse a base that adapters cannot be written for.

    Raises:
        ValueError: for a folder that is not there, or that `--format hf` did not write.
    """
    folder = Path(resolve(base, weights=False))
    if not folder.is_dir():
        raise ValueError(f"--base {base} is no folder, and no model of the hub that is here")
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != LitVLMConfig.model_type:
        raise ValueError(f"--base {base} is no folder that `lit-vlm export --format hf` wrote")
    if settings.get("quantise"):
        raise ValueError(f"--base {base} has weights in fewer bits: give one that was exported without --quantise")


def _opened(folder: Path, dtype: torch.dtype) -> LitVLMForConditionalGeneration:
    """An exported model, by the kit's own class: code that lies in its folder is not run."""
    loaded: LitVLMForConditionalGeneration = LitVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return loaded


def _identity(folder: Path) -> dict[str, Any]:
    """SHA-256 of the files of weights, and of the parts that the configuration names."""
    weights: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            weights[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    if not weights:
        raise ValueError(f"there are no weights (*.safetensors) in {folder}")
    parts = json.dumps(read_json(folder / "config.json").get("slots"), sort_keys=True)
    return {"weights": weights, "parts": hashlib.sha256(parts.encode()).hexdigest()}


@contextmanager
def _without_adapters(model: VLM) -> Iterator[None]:
    """Take the layers with adapters off their places, and put them back."""
    layers = list(adapted_layers(model))
    for name, layer in layers:
        model.set_submodule(name, layer.get_base_layer())  # type: ignore[operator]
    try:
        yield
    finally:
        for name, layer in layers:
            model.set_submodule(name, layer)


def _check_weights(model: VLM, loaded: LitVLMForConditionalGeneration, base: str) -> tuple[str, ...]:
    """Slots, and modules beside adapters, whose weights are others than the base's.

    The model gets the base's weights where these are its own, rounded.

    Raises:
        ValueError: for other parts, or other weights under an adapter.
    """
    adapted, whole = {name for name, _ in adapted_layers(model)}, []
    for slot in SLOTS:
        part = model.slots()[slot][0]
        own, adapters = split_state(part.state_dict())
        theirs = loaded.inner.slots()[slot][0].state_dict()
        if unlike := [key for key in sorted(own.keys() | theirs.keys()) if _shape(own, key) != _shape(theirs, key)]:
            raise ValueError(f"--base {base} has other parts in the slot '{slot}' than this run: {shortened(unlike)}")
        differing = sorted(key for key, value in own.items() if not _same(value, theirs[key]))
        modules = list(dict.fromkeys(f"{slot}.{key}".rpartition(".")[0] for key in differing))
        # Around the adapters nothing can be saved whole.
        if under := [module for module in modules if module in adapted or (adapters and module == slot)]:
            raise ValueError(
                f"--base {base} has other weights under the adapters of {shortened(under)}: give the base that this "
                "run started from, or leave --base out, and the base is written as well"
            )
        whole += modules if adapters else [slot] if differing else []
        for key in own.keys() - set(differing):
            own[key].copy_(theirs[key])  # a view of the parameter, whatever its name is with an adapter
    return tuple(whole)


def _shape(state: Mapping[str, Tensor], key: str) -> torch.Size | None:
    return state[key].shape if key in state else None


def _same(ours: Tensor, base: Tensor) -> bool:
    """Whether a weight of a base is ours, or ours rounded to a type that the base was stored in."""
    return any(
        torch.equal(ours.to(dtype).to(base.dtype), base) for dtype in (ours.dtype, torch.bfloat16, torch.float16)
    )


def _wrapped(model: VLM, loaded: LitVLMForConditionalGeneration, whole: tuple[str, ...]) -> Any:
    """The base in PEFT's model, with the adapters of the kit's model, and what of it is written whole."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    layers: dict[str, Any] = {f"{INNER}{name}": layer for name, layer in adapted_layers(model)}
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha["default"] for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=max(getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers.values()),
        target_modules=sorted(layers),
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in alphas.items() if own != alpha},
        modules_to_save=[f"{INNER}{name}" for name in whole] or None,
    )
    adapted = get_peft_model(loaded, settings)
    state = {
        f"base_model.model.{INNER}{key.replace('.default.', '.') if is_adapter(key) else key}": value
        for key, value in model.state_dict().items()
        if is_adapter(key) or key.startswith(tuple(f"{name}." for name in whole))
    }
    set_peft_model_state_dict(adapted, state)
    return adapted


def _projector(adapted: Any) -> nn.Module:
    """The projector that PEFT's model runs."""
    found: Any = adapted.get_base_model().inner.projector
    saved = getattr(found, "modules_to_save", None)
    kept: nn.Module = found if saved is None else saved["default"]
    return kept
