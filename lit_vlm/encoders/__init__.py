"""Encoders: pixels → visual tokens."""

from lit_vlm.encoders.base import Encoder, PatchGrid
from lit_vlm.encoders.conv_patches import ConvPatches
from lit_vlm.encoders.eve import EvePatchEmbedding
from lit_vlm.encoders.eve_v2 import EveV2PatchEmbedding
from lit_vlm.encoders.hf import HFEncoder
from lit_vlm.encoders.linear import LinearPatches
from lit_vlm.encoders.timm import TimmEncoder

__all__ = [
    "ConvPatches",
    "Encoder",
    "EvePatchEmbedding",
    "EveV2PatchEmbedding",
    "HFEncoder",
    "LinearPatches",
    "PatchGrid",
    "TimmEncoder",
]
