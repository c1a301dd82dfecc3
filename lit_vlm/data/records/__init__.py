"""Records: the samples of a source before templates and transforms, and the reading of their pictures."""

from lit_vlm.data.records.pictures import (
    decode_image,
    image_bytes,
    image_size,
    open_image,
)
from lit_vlm.data.records.record import (
    MAX_DETAIL,
    MAX_SIDE,
    ROLES,
    Content,
    Image,
    Message,
    Record,
    RecordError,
    Role,
    Text,
)
from lit_vlm.data.records.videos import Videos

__all__ = [
    "MAX_DETAIL",
    "MAX_SIDE",
    "ROLES",
    "Content",
    "Image",
    "Message",
    "Record",
    "RecordError",
    "Role",
    "Text",
    "Videos",
    "decode_image",
    "image_bytes",
    "image_size",
    "open_image",
]
