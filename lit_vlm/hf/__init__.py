"""Models of the kit as transformers loads them: configuration, model and processor of an exported folder."""

from lit_vlm.hf.config import LitVLMConfig
from lit_vlm.hf.model import LitVLMForConditionalGeneration
from lit_vlm.hf.processor import LitVLMProcessor

__all__ = ["LitVLMConfig", "LitVLMForConditionalGeneration", "LitVLMProcessor"]
