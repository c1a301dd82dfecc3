"""Published weights in and out, one module per family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published import eve, eve_v2, hovle, llava_hf, ola_vlm, vila
from lit_vlm.checkpoints.published.layout import read_config
from lit_vlm.core.pretrained import resolve
from lit_vlm.data import ImageTransform
from lit_vlm.model.vlm import VLM

FAMILIES = {
    "eve": eve,
    "eve_v2": eve_v2,
    "hovle": hovle.BASE,
    "hovle_hd": hovle.HD,
    "llava-hf": llava_hf,
    "ola_vlm": ola_vlm,
    "vila": vila,
}

MODEL_TYPES = {
    "eve": ("eve",),
    "eve_v2": ("eve", "eve-qwen2"),
    "hovle": ("internvl_chat",),
    "hovle_hd": ("internvl_chat",),
    "llava-hf": ("llava",),
    "ola_vlm": ("ola_llama", "ola_phi3", "llava_llama", "llava_phi3"),
    "vila": ("llava_llama",),
}
"""Family → what `model_type` is in the config.json of its folders."""


def load_published(
    family: str, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> VLM:
    """A model from weights under published names.

    Args:
        family: `eve`, `eve_v2`, `hovle`, `hovle_hd`, `llava-hf`, `ola_vlm` or `vila`.
        source: a folder (or hub name) with config and weights, or a state dict under published names.
        config: the published configuration; needed with a state dict.

    Raises:
        ValueError: for a key that fits nowhere, a weight of the model that no key gives, or a setting that is absent.
    """
    module = _family(family)
    with _reading(family, source):
        _check_family(family, config if config is not None or isinstance(source, Mapping) else str(source))
        model: VLM = module.load(source, config)
    return model


def read_published(family: str, source: str) -> dict[str, dict[str, Tensor]]:
    """Published weights by slot: encoder, projector, decoder, and `heads.NAME` for heads that were published too.

    Args:
        family: as above.
        source: a folder or hub name with config and weights.

    Raises:
        ValueError: for an unknown family, or a key that fits nowhere.
    """
    module = _family(family)
    with _reading(family, source):
        _check_family(family, source)
        slots: dict[str, dict[str, Tensor]] = module.read(source)
    return slots


def export_published(family: str, model: VLM, out: Path, transform: ImageTransform | None) -> float:
    """Write a model under published names, read it back, and compare logits.

    Args:
        family: as above.
        model: of that family's form.
        out: a folder that is new or empty.
        transform: how pictures were resized.

    Returns:
        the largest difference of the logits on a random picture and text, in fp32.

    Raises:
        ValueError: for an unknown family, a model of another form, or logits that differ.
    """
    difference: float = _family(family).export(model, out, transform)
    return difference


@contextmanager
def _reading(family: str, source: object) -> Iterator[None]:
    """Say of an error what was read, and name the setting or weight that a family needs and does not find."""
    where = f"{source if isinstance(source, str | Path) else 'the state dict'}, read as {family}"
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where}: neither config.json nor the weights have {error}, which it needs") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_family(family: str, config: Mapping[str, Any] | str | None) -> None:
    """Refuse a configuration, or that of a folder, that is another family's; one that is nobody's passes."""
    settings = read_config(resolve(config)) if isinstance(config, str) else config or {}
    found = settings.get("model_type")
    others = [name for name, types in MODEL_TYPES.items() if found in types]
    if others and family not in others:
        raise ValueError(f"config.json says model_type '{found}', which is the family {' or '.join(others)}")


def _family(name: str) -> Any:
    if name not in FAMILIES:
        raise ValueError(f"there is no family '{name}'; families: {', '.join(FAMILIES)}")
    return FAMILIES[name]
