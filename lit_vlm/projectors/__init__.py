"""Projectors: encoder width → decoder width, maybe fewer tokens."""

from lit_vlm.projectors.base import Projector
from lit_vlm.projectors.downsample import Downsample, Downsample3x3, DownsampleLinear, PatchMerge
from lit_vlm.projectors.mlp import MLP, Identity, Linear
from lit_vlm.projectors.per_encoder import PerEncoder
from lit_vlm.projectors.qwen import QwenMerger
from lit_vlm.projectors.resampler import PerceiverLayer, Resampler
from lit_vlm.projectors.transformer import Transformer

__all__ = [
    "MLP",
    "Downsample",
    "Downsample3x3",
    "DownsampleLinear",
    "Identity",
    "Linear",
    "PatchMerge",
    "PerEncoder",
    "PerceiverLayer",
    "Projector",
    "QwenMerger",
    "Resampler",
    "Transformer",
]
