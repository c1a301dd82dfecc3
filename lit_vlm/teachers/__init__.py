"""Teachers: frozen networks whose features are the targets of heads."""

from lit_vlm.teachers.base import EncoderTeacher, Teacher

__all__ = ["EncoderTeacher", "Teacher"]
