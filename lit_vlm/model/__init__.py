"""The five slots put together: the model, how it is built, how it answers."""

from lit_vlm.model.vlm import NEXT_TOKEN, VLM

__all__ = ["NEXT_TOKEN", "VLM"]
