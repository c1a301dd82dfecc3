"""Heads: named auxiliary losses on tapped decoder states."""

from lit_vlm.heads.base import Head
from lit_vlm.heads.feature_distillation import FeatureDistillation

__all__ = ["FeatureDistillation", "Head"]
