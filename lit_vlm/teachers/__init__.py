"""Teachers: frozen networks whose features are the targets of heads."""

from lit_vlm.teachers.base import EncoderTeacher, Teacher
from lit_vlm.teachers.dinov2 import DINOv2
from lit_vlm.teachers.hf import HFVision
from lit_vlm.teachers.known_map import KnownMap, MapName

__all__ = ["DINOv2", "EncoderTeacher", "HFVision", "KnownMap", "MapName", "Teacher"]
