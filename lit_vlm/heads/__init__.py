"""Heads: named auxiliary losses on tapped decoder states."""

from lit_vlm.heads.base import WORDS, Head
from lit_vlm.heads.feature_distillation import FeatureDistillation
from lit_vlm.heads.holistic_distillation import HolisticDistillation, WordDistillation
from lit_vlm.heads.patch_alignment import PatchAlignment

__all__ = ["WORDS", "FeatureDistillation", "Head", "HolisticDistillation", "PatchAlignment", "WordDistillation"]
