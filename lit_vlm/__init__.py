"""lit-vlm: a modular experiment kit, on PyTorch Lightning, for training vision-language models."""

__version__ = "0.1.0"
