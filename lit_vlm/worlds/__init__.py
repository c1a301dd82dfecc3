"""Pictures that need no file: drawn scenes, shapes and emoji, with all that is known of them."""

from lit_vlm.worlds.namings import Namings
from lit_vlm.worlds.openmoji import OpenMoji
from lit_vlm.worlds.scenes import Scenes
from lit_vlm.worlds.shapes import Shapes

__all__ = ["Namings", "OpenMoji", "Scenes", "Shapes"]
