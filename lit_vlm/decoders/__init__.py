"""Decoders: causal language models."""

from lit_vlm.core.lora import Lora
from lit_vlm.decoders.absent import AbsentDecoder
from lit_vlm.decoders.base import Decoder, DecoderOutput
from lit_vlm.decoders.divide_and_conquer import DivideAndConquer
from lit_vlm.decoders.hf import HFDecoder
from lit_vlm.decoders.order import check_cache, check_images, check_order

__all__ = [
    "AbsentDecoder",
    "Decoder",
    "DecoderOutput",
    "DivideAndConquer",
    "HFDecoder",
    "Lora",
    "check_cache",
    "check_images",
    "check_order",
]
