"""Data: records → sources → mixture and batching → template → transform → collate → data module."""

import importlib

from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.feed.batching import Batching, ModalityLength, Packed, Padded
from lit_vlm.data.feed.loader import BadSamples
from lit_vlm.data.feed.mixture import Interleaved, Mixture, Shuffled, Weighted
from lit_vlm.data.sample.any_res import AnyRes
from lit_vlm.data.sample.fit_box import FitBox
from lit_vlm.data.sample.fuyu import Fuyu
from lit_vlm.data.sample.hf_chat import HFChat
from lit_vlm.data.sample.pixel_budget import NativeArea, PatchBudget
from lit_vlm.data.sample.templates import ChatML, Llama3, Phi3, Plain, Template, VicunaV1
from lit_vlm.data.sample.tiles import Tiles
from lit_vlm.data.sample.transforms import (
    AreaLimit,
    AspectGrid,
    ImageTransform,
    Native,
    PadSquare,
    Resize,
    SquareCrop,
)
from lit_vlm.data.sources import (
    Captions,
    ChatJsonl,
    Converted,
    Grouped,
    LlavaJson,
    LlavaVideo,
    Mmc4,
    Parquet,
    Pictures,
    RandomWords,
    Source,
    Texts,
    Unpaired,
    Vetted,
    WebDataset,
)

__all__ = [
    "AnyRes",
    "AreaLimit",
    "AspectGrid",
    "BadSamples",
    "Batching",
    "Captions",
    "ChatJsonl",
    "ChatML",
    "Converted",
    "FitBox",
    "Fuyu",
    "Grouped",
    "HFChat",
    "ImageTransform",
    "Interleaved",
    "Llama3",
    "LlavaJson",
    "LlavaVideo",
    "Mixture",
    "Mmc4",
    "ModalityLength",
    "Native",
    "NativeArea",
    "Packed",
    "PadSquare",
    "Padded",
    "Parquet",
    "PatchBudget",
    "Phi3",
    "Pictures",
    "Plain",
    "RandomWords",
    "Resize",
    "Shuffled",
    "Source",
    "SquareCrop",
    "Template",
    "Texts",
    "Tiles",
    "Unpaired",
    "VLMData",
    "Vetted",
    "VicunaV1",
    "WebDataset",
    "Weighted",
]


def __getattr__(name: str) -> object:
    # Config files of earlier versions name these here; they stand on top of all that is data.
    if name in ("OpenMoji", "Scenes", "Shapes"):
        return getattr(importlib.import_module("lit_vlm.worlds"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
