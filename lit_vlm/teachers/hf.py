"""Vision transformers of the transformers library as teachers."""

from __future__ import annotations

from functools import partial
from typing import Any

from lit_vlm.core.backbones import check_one_source
from lit_vlm.encoders.hf import HFEncoder
from lit_vlm.teachers.base import EncoderTeacher


class HFVision(EncoderTeacher):
    """Patch features of CLIP, SigLIP, DINOv2, DINOv3 or AIMv2 (EVE, section 3.2: CLIP-L/14 at 336 pixels).

    Args:
        name: hub name or local folder. Or null, with `config`.
        config: a model configuration with `model_type`, for random weights.
        layer: index into the hidden states; −2, the one before the last, is what EVE's code takes.
        side: see `HFEncoder`.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given; and as `HFEncoder`.
    """

    def __init__(
        self,
        name: str | None = "openai/clip-vit-large-patch14-336",
        config: dict[str, Any] | None = None,
        layer: int = -2,
        side: int | None = None,
    ) -> None:
        check_one_source("teacher HFVision", name, config)
        super().__init__(partial(HFEncoder, name=name, config=config, layer=layer, side=side))
