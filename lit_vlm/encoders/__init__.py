"""Encoders: pixels → visual tokens."""

from lit_vlm.encoders.base import Encoder, PatchGrid
from lit_vlm.encoders.clip_embedding import CLIPEmbedding
from lit_vlm.encoders.conv_patches import ConvPatches
from lit_vlm.encoders.depth_anything import DepthAnything
from lit_vlm.encoders.dinov3_convnext import DINOv3ConvNeXt
from lit_vlm.encoders.ensemble import Ensemble
from lit_vlm.encoders.eve import EvePatchEmbedding
from lit_vlm.encoders.eve_v2 import EveV2PatchEmbedding
from lit_vlm.encoders.hf import HFEncoder
from lit_vlm.encoders.linear import LinearPatches
from lit_vlm.encoders.moonvit import MoonViT
from lit_vlm.encoders.naflex import NaFlexEncoder
from lit_vlm.encoders.oneformer import OneFormerSwin
from lit_vlm.encoders.qwen import QwenEncoder
from lit_vlm.encoders.s2 import S2
from lit_vlm.encoders.timm import TimmEncoder

__all__ = [
    "S2",
    "CLIPEmbedding",
    "ConvPatches",
    "DINOv3ConvNeXt",
    "DepthAnything",
    "Encoder",
    "Ensemble",
    "EvePatchEmbedding",
    "EveV2PatchEmbedding",
    "HFEncoder",
    "LinearPatches",
    "MoonViT",
    "NaFlexEncoder",
    "OneFormerSwin",
    "PatchGrid",
    "QwenEncoder",
    "TimmEncoder",
]
