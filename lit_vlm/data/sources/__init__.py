"""Sources: files of samples, read as canonical records."""

from lit_vlm.data.sources.base import Source
from lit_vlm.data.sources.captions import Captions, Pictures
from lit_vlm.data.sources.conversations import ChatJsonl, LlavaJson
from lit_vlm.data.sources.converted import Converted
from lit_vlm.data.sources.documents import Mmc4, Texts
from lit_vlm.data.sources.grouped import Grouped
from lit_vlm.data.sources.tables import Parquet
from lit_vlm.data.sources.tars import WebDataset
from lit_vlm.data.sources.unpaired import RandomWords, Unpaired
from lit_vlm.data.sources.vetted import Vetted
from lit_vlm.data.sources.videos import LlavaVideo

__all__ = [
    "Captions",
    "ChatJsonl",
    "Converted",
    "Grouped",
    "LlavaJson",
    "LlavaVideo",
    "Mmc4",
    "Parquet",
    "Pictures",
    "RandomWords",
    "Source",
    "Texts",
    "Unpaired",
    "Vetted",
    "WebDataset",
]
