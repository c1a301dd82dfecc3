"""The classes of this folder's model, which come from the package lit-vlm: nothing else of it is stored here."""

try:
    from lit_vlm.hf import LitVLMConfig, LitVLMForConditionalGeneration, LitVLMProcessor
except ImportError as error:
    raise ImportError(
        "this model runs by the package lit-vlm, which is not installed here, or is too old for it: "
        "pip install lit-vlm (config.json has the version that wrote it under lit_vlm_version). "
        f"Python says: {error}"
    ) from error

__all__ = ["LitVLMConfig", "LitVLMForConditionalGeneration", "LitVLMProcessor"]
