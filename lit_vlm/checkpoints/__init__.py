"""Weights in and out: a run's own checkpoints, and published formats."""

from lit_vlm.checkpoints.files import find_checkpoint, read_slots, read_state

__all__ = ["find_checkpoint", "load_published", "read_slots", "read_state"]


def __getattr__(name: str) -> object:
    # Imported when asked for: building a model reads checkpoint files, and published formats build models.
    if name == "load_published":
        from lit_vlm.checkpoints.published import load_published

        return load_published
    raise AttributeError(name)
