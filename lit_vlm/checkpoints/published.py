"""Published weights in and out, one module per family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints import eve, eve_v2, hovle, llava_hf, ola_vlm, vila
from lit_vlm.data import ImageTransform
from lit_vlm.model import VLM

FAMILIES = {
    "eve": eve,
    "eve_v2": eve_v2,
    "hovle": hovle.BASE,
    "hovle_hd": hovle.HD,
    "llava-hf": llava_hf,
    "ola_vlm": ola_vlm,
    "vila": vila,
}


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
    with _complete(family, source):
        return _family(family).load(source, config)


def read_published(family: str, source: str) -> dict[str, dict[str, Tensor]]:
    """Published weights by slot: encoder, projector, decoder, and `heads.NAME` for heads that were published too.

    Args:
        family: as above.
        source: a folder or hub name with config and weights.

    Raises:
        ValueError: for an unknown family, or a key that fits nowhere.
    """
    with _complete(family, source):
        return _family(family).read(source)


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
def _complete(family: str, source: object) -> Iterator[None]:
    """Name the setting or weight that a family needs and does not find."""
    try:
        yield
    except KeyError as error:
        where = source if isinstance(source, str | Path) else "the state dict"
        raise ValueError(
            f"{where}: neither config.json nor the weights have {error}, which the family {family} needs"
        ) from error


def _family(name: str) -> Any:
    if name not in FAMILIES:
        raise ValueError(f"there is no family '{name}'; families: {', '.join(FAMILIES)}")
    return FAMILIES[name]
