"""Heads: named auxiliary losses on tapped decoder states."""

from lit_vlm.heads.base import WORDS, CountName, Head, Normaliser, Tap
from lit_vlm.heads.embedding_distillation import EmbeddingDistillation
from lit_vlm.heads.feature_distillation import FeatureDistillation
from lit_vlm.heads.holistic_distillation import HolisticDistillation, WordDistillation
from lit_vlm.heads.patch_alignment import PatchAlignment

__all__ = [
    "WORDS",
    "CountName",
    "EmbeddingDistillation",
    "FeatureDistillation",
    "Head",
    "HolisticDistillation",
    "Normaliser",
    "PatchAlignment",
    "Tap",
    "WordDistillation",
]
