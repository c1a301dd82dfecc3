"""lit-vlm: a modular experiment kit, on PyTorch Lightning, for training vision-language models."""

from lit_vlm import _moved  # noqa: F401 - module paths of earlier versions

__version__ = "0.1.0"
