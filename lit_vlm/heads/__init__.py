"""Heads: named auxiliary losses on tapped decoder states."""

from lit_vlm.heads.base import Head
from lit_vlm.heads.feature_distillation import FeatureDistillation
from lit_vlm.heads.patch_alignment import PatchAlignment

__all__ = ["FeatureDistillation", "Head", "PatchAlignment"]
