"""Lightning's Trainer, with a precision that is chosen for the device."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch.plugins import Precision as PrecisionPlugin
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_vlm.core.precision import AUTO, Precision, choose

CUDA = ("auto", "gpu", "cuda")
"""Names of Lightning's accelerators that mean an NVIDIA GPU where there is one."""


class Trainer(L.Trainer):
    """Lightning's Trainer.

    Args:
        precision: `auto` takes what the device does fast: bf16-mixed where it multiplies matrices faster in bf16 than
            in fp32, 16-mixed on cards without bf16 (not sharded), 32-true elsewhere. Any other value is Lightning's.

    Attributes:
        chosen: what `auto` has become, and why; None where a value was given.
    """

    chosen: Precision | None

    def __init__(self, *, precision: Literal["auto"] | _PRECISION_INPUT | None = AUTO, **kwargs: Any) -> None:
        self.chosen = None
        plugins = kwargs.get("plugins") or ()
        plugins = plugins if isinstance(plugins, list | tuple) else [plugins]
        if precision == "auto" and any(isinstance(plugin, PrecisionPlugin) for plugin in plugins):
            super().__init__(**kwargs)  # the plugin decides; Lightning refuses both
        elif precision == "auto":
            scaled = not isinstance(kwargs.get("strategy"), ModelParallelStrategy)
            self.chosen = choose(_device_type(kwargs.get("accelerator", "auto")), scaled)
            super().__init__(precision=self.chosen.name, **kwargs)
        else:
            super().__init__(precision=precision, **kwargs)


def _device_type(accelerator: Any) -> str:
    """The type of torch device that an accelerator stands for."""
    if accelerator in CUDA and torch.cuda.is_available():
        return "cuda"
    if accelerator == "auto":
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return str(accelerator)
