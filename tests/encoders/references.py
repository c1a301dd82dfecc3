"""Tiny models of transformers and timm, saved to a folder, and what they make of one picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Siglip2ImageProcessor

from lit_vlm.encoders import DINOv3ConvNeXt, Encoder, HFEncoder, MoonViT, NaFlexEncoder, QwenEncoder, TimmEncoder
from tests.encoders import test_dinov3_convnext, test_hf, test_moonvit, test_naflex, test_qwen

HF_SIZES = test_hf.SIZES
HF_TYPES = {
    "CLIP": "clip_vision_model",
    "SigLIP": "siglip_vision_model",
    "DINOv2": "dinov2",
    "DINOv2 with registers": "dinov2_with_registers",
    "DINOv3 ViT": "dinov3_vit",
    "AIMv2": "aimv2_vision_model",
    "InternViT": "internvl_vision",
}
"""Family → `model_type` of HFEncoder."""
NAFLEX, CONVNEXT, MOONVIT = test_naflex.CONFIG, test_dinov3_convnext.CONFIG, test_moonvit.CONFIG
QWEN2_5, QWEN3 = test_qwen.CONFIGS["qwen2_5_vl_vision"], test_qwen.CONFIGS["qwen3_vl_vision"]


class Reference(NamedTuple):
    """A saved model.

    Attributes:
        library: whose model it is.
        named: makes the encoder that reads the saved files.
        expected: encoder, and a picture uint8 `[3, h, w]` → features `[t, d_e]` of the library's model.
    """

    library: str
    named: Callable[[], Encoder]
    expected: Callable[[Encoder, Tensor], Tensor]


def _hf(model_type: str, folder: Path) -> Reference:
    model = test_hf.tiny(model_type, folder)

    def expected(encoder: Encoder, picture: Tensor) -> Tensor:
        pixels = encoder.normalise(picture[None], torch.float32)
        return test_hf.hidden_states(model, pixels)[-2][0, -encoder.patch_grid(*picture.shape[1:]).num_tokens :]

    return Reference("transformers", partial(HFEncoder, str(folder)), expected)


def _naflex(folder: Path) -> Reference:
    model = test_naflex.saved(folder)
    processor = Siglip2ImageProcessor(patch_size=4, do_resize=False)

    def expected(encoder: Encoder, picture: Tensor) -> Tensor:
        count = encoder.patch_grid(*picture.shape[1:]).num_tokens
        patches = processor(images=[picture], max_num_patches=count, return_tensors="pt")
        return model(**patches, output_hidden_states=True).hidden_states[-2][0]

    return Reference("transformers", partial(NaFlexEncoder, str(folder)), expected)


def _qwen(model_type: str, folder: Path) -> Reference:
    tower = test_qwen.saved(model_type, folder)

    def expected(_encoder: Encoder, picture: Tensor) -> Tensor:
        return test_qwen.expected_states(tower, test_qwen.processed(model_type, picture), [-1])

    return Reference("transformers", partial(QwenEncoder, str(folder)), expected)


def _moonvit(folder: Path) -> Reference:
    tower = test_moonvit.saved(folder)

    def expected(encoder: Encoder, picture: Tensor) -> Tensor:
        assert isinstance(encoder, MoonViT)
        return test_moonvit.expected_states(tower, encoder, picture, [-1])

    return Reference("transformers", partial(MoonViT, str(folder)), expected)


def _convnext(folder: Path) -> Reference:
    model = test_dinov3_convnext.saved(folder)

    def expected(encoder: Encoder, picture: Tensor) -> Tensor:
        states = model(encoder.normalise(picture[None], torch.float32), output_hidden_states=True).hidden_states
        return states[-1][0].flatten(1).T

    return Reference("transformers", partial(DINOv3ConvNeXt, str(folder)), expected)


def _timm(name: str, size: int | None, folder: Path) -> Reference:
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    for parameter in whole.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_file(whole.state_dict(), folder / "model.safetensors")

    def expected(encoder: Encoder, picture: Tensor) -> Tensor:
        pixels = encoder.normalise(picture[None], torch.float32)
        (found,) = whole.forward_intermediates(pixels, indices=[-1], intermediates_only=True, output_fmt="NCHW")
        return found[0].flatten(1).T

    named = partial(TimmEncoder, name, str(folder / "model.safetensors"), image_size=size)
    return Reference("timm", named, expected)


SAVED: dict[str, Callable[[Path], Reference]] = {
    name: partial(_hf, model_type) for name, model_type in HF_TYPES.items()
} | {
    "SigLIP 2 NaFlex": _naflex,
    "Qwen2.5-VL": partial(_qwen, "qwen2_5_vl_vision"),
    "Qwen3-VL": partial(_qwen, "qwen3_vl_vision"),
    "Qwen3-VL MoE": partial(_qwen, "qwen3_vl_moe_vision"),
    "MoonViT": _moonvit,
    "DINOv3 ConvNeXt": _convnext,
    "timm ViT": partial(_timm, "test_vit", None),
    "timm ViT, register token": partial(_timm, "test_vit3", None),
    "timm ConvNeXt": partial(_timm, "test_convnext", 64),
}
