"""Data: records → sources → template → transform → pack → collate → data module."""

from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.loader import BadSamples
from lit_vlm.data.openmoji import OpenMoji
from lit_vlm.data.shapes import Shapes
from lit_vlm.data.sources import Captions, ChatJsonl, LlavaJson, Source
from lit_vlm.data.templates import ChatML, Llama3, Plain, Template, VicunaV1
from lit_vlm.data.transforms import ImageTransform, Native, PadSquare, Resize, SquareCrop

__all__ = [
    "BadSamples",
    "Captions",
    "ChatJsonl",
    "ChatML",
    "ImageTransform",
    "Llama3",
    "LlavaJson",
    "Native",
    "OpenMoji",
    "PadSquare",
    "Plain",
    "Resize",
    "Shapes",
    "Source",
    "SquareCrop",
    "Template",
    "VLMData",
    "VicunaV1",
]
