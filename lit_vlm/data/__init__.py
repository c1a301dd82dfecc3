"""Data: records → sources → mixture and batching → template → transform → collate → data module."""

from lit_vlm.data.batching import Batching, ModalityLength, Packed, Padded
from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.loader import BadSamples
from lit_vlm.data.mixture import Interleaved, Mixture, Shuffled, Weighted
from lit_vlm.data.openmoji import OpenMoji
from lit_vlm.data.scenes import Scenes
from lit_vlm.data.shapes import Shapes
from lit_vlm.data.sources import (
    Captions,
    ChatJsonl,
    Converted,
    Grouped,
    LlavaJson,
    Mmc4,
    Parquet,
    Pictures,
    RandomWords,
    Source,
    Texts,
    Unpaired,
    WebDataset,
)
from lit_vlm.data.templates import ChatML, Llama3, Phi3, Plain, Template, VicunaV1
from lit_vlm.data.tiles import Tiles
from lit_vlm.data.transforms import (
    AreaLimit,
    AspectGrid,
    ImageTransform,
    Native,
    PadSquare,
    Resize,
    SquareCrop,
)

__all__ = [
    "AreaLimit",
    "AspectGrid",
    "BadSamples",
    "Batching",
    "Captions",
    "ChatJsonl",
    "ChatML",
    "Converted",
    "Grouped",
    "ImageTransform",
    "Interleaved",
    "Llama3",
    "LlavaJson",
    "Mixture",
    "Mmc4",
    "ModalityLength",
    "Native",
    "OpenMoji",
    "Packed",
    "PadSquare",
    "Padded",
    "Parquet",
    "Phi3",
    "Pictures",
    "Plain",
    "RandomWords",
    "Resize",
    "Scenes",
    "Shapes",
    "Shuffled",
    "Source",
    "SquareCrop",
    "Template",
    "Texts",
    "Tiles",
    "Unpaired",
    "VLMData",
    "VicunaV1",
    "WebDataset",
    "Weighted",
]
