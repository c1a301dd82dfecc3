"""Published weights in and out, one module per family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published import hovle
from lit_vlm.checkpoints.published.eve import Eve
from lit_vlm.checkpoints.published.eve_v2 import EveV2
from lit_vlm.checkpoints.published.family import Family
from lit_vlm.checkpoints.published.fuyu import Fuyu
from lit_vlm.checkpoints.published.layout import SlotStates, read_config
from lit_vlm.checkpoints.published.llava_hf import LlavaHf
from lit_vlm.checkpoints.published.llava_next import LlavaNext
from lit_vlm.checkpoints.published.mono_internvl import MonoInternVL
from lit_vlm.checkpoints.published.ola_vlm import OlaVlm
from lit_vlm.checkpoints.published.vila import Vila
from lit_vlm.core.lora import merge_adapters
from lit_vlm.core.plugins import find_class
from lit_vlm.core.pretrained import resolve
from lit_vlm.core.written import whole_folder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders.images import CAUSAL
from lit_vlm.embedders import Splice
from lit_vlm.model.vlm import VLM

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Eve(),
        EveV2(),
        Fuyu(),
        hovle.BASE,
        hovle.HD,
        LlavaHf(),
        LlavaNext(),
        MonoInternVL(),
        OlaVlm(),
        Vila(),
    )
}
"""The families of the kit, by name."""


def find_family(name: str) -> Family:
    """A family by its name, or by the path of its class.

    Raises:
        ValueError: for an unknown family, with the nearest names.
    """
    if name in FAMILIES:
        return FAMILIES[name]
    own = {key: type(family) for key, family in FAMILIES.items()}
    return find_class(name, Family, own, "family")()  # type: ignore[type-abstract]


def load_published(
    family: str, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> VLM:
    """A model from weights under published names.

    Args:
        family: `eve`, `eve_v2`, `fuyu`, `hovle`, `hovle_hd`, `llava-hf`, `llava_next`, `mono_internvl`, `ola_vlm`,
            `vila`, or the path of a `Family`.
        source: a folder (or hub name) with config and weights, or a state dict under published names.
        config: the published configuration; needed with a state dict.

    Raises:
        ValueError: for an unknown family or another family's configuration, a key that belongs to no slot, a weight of
            the model that no key gives, or an absent setting.
    """
    found = find_family(family)
    with _reading(family, source):
        _check_family(found, config if config is not None or isinstance(source, Mapping) else str(source))
        return found.load(source, config)


def read_published(family: str, source: str) -> SlotStates:
    """Published weights by slot: encoder, projector, decoder, and `heads.NAME` for heads that were published too.

    Args:
        family: as in `load_published`.
        source: a folder or hub name with config and weights.

    Raises:
        ValueError: for an unknown family or another family's configuration, or a key that belongs to no slot.
    """
    found = find_family(family)
    with _reading(family, source):
        _check_family(found, source)
        return found.read(source)


def export_published(family: str, model: VLM, out: Path, written: SampleFormat | None) -> float:
    """Write a model under published names, read it back, and compare logits.

    Args:
        family: as in `load_published`.
        model: of the parts that the family consists of; adapters are merged into its weights, in place.
        out: a folder that is new or empty.
        written: template and transform of its data.

    Returns:
        the largest difference of the logits on a random picture and text, in fp32.

    Raises:
        ValueError: for an unknown family, a model of other parts, a folder that is not empty, or logits that differ;
            and as `check_form`.
    """
    found = find_family(family)
    check_form(model, family, found.row_ends)
    merge_adapters(model)
    with whole_folder(out) as scratch:
        return found.export(model, scratch, written)


def check_form(model: VLM, form: str, row_ends: bool = False) -> None:
    """Refuse what the code that reads a form does otherwise without a word.

    Args:
        model: what is to be written.
        form: name of the form.
        row_ends: whether that code puts a word's vector behind each row of patches.

    Raises:
        ValueError: for images that see all of themselves in the decoder, or row ends; names the setting and a form that
            has it.
    """
    if not row_ends and isinstance(model.embedder, Splice) and model.embedder.row_end is not None:
        raise ValueError(
            f"{form} puts no word behind the rows of a picture, and this model was trained with model.embedder's "
            f"row_end {model.embedder.row_end!r}: take lit-vlm export --format hf"
        )
    if model.decoder.image_attention != CAUSAL:
        raise ValueError(
            f"{form} has no decoder with image_attention: {model.decoder.image_attention}, and would be asked as a "
            "causal one: take lit-vlm export --format hf, or train with model.decoder.init_args.image_attention: causal"
        )


@contextmanager
def _reading(family: str, source: object) -> Iterator[None]:
    """Turn errors of a family into a ValueError that names what was read, and the setting or weight that is missing."""
    where = f"{source if isinstance(source, str | Path) else 'the state dict'}, read as {family}"
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: neither config.json nor the weights have {error}, which it needs") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_family(family: Family, config: Mapping[str, Any] | str | None) -> None:
    """Refuse a configuration (or a folder with one) of another family; a `model_type` of no family passes."""
    if not family.model_types:  # its folders need not have a config.json
        return
    settings = read_config(resolve(config, weights=False)) if isinstance(config, str) else config or {}
    found = settings.get("model_type")
    others = [other.name for other in FAMILIES.values() if found in other.model_types]
    if others and found not in family.model_types:
        raise ValueError(f"config.json says model_type '{found}', which is the family {' or '.join(others)}")
