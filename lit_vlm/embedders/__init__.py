"""Embedders: text ids and visual tokens → decoder inputs."""

from lit_vlm.embedders.base import Embedder
from lit_vlm.embedders.holistic import Holistic
from lit_vlm.embedders.splice import Splice
from lit_vlm.embedders.splice_tiles import SpliceTiles

__all__ = ["Embedder", "Holistic", "Splice", "SpliceTiles"]
