"""What can never work with the sources of a run, said before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lit_vlm.data.records import Image, RecordError
from lit_vlm.data.sources.base import Source

LOOKED_AT = 16
"""Records of a source among which its first picture is looked for."""


def check_sources(sources: Sequence[Source], known: Mapping[str, str], key: str) -> None:
    """See that each source has samples, and that its first picture carries the maps that heads read.

    Args:
        sources: of one key of the config.
        known: the map that each head reads, as in `InputSpec.known`.
        key: of the config, for the error.

    Raises:
        ValueError: naming the source; for a map, the head too. A file holds none, so every picture would be dropped.
    """
    for source in sources:
        if not len(source):
            raise ValueError(f"{key}: the source '{source.name}' ({source.path or 'no file'}) holds no sample")
        picture = _first_picture(source) if known else None
        carried = sorted(picture.maps or ()) if picture is not None else []
        for head, wanted in known.items():
            if picture is not None and wanted not in carried:
                raise ValueError(
                    f"the head '{head}' reads the map '{wanted}' of every picture, and those of the source "
                    f"'{source.name}' in {key} carry {', '.join(carried) or 'none'}: lit_vlm.data.Scenes with maps has "
                    f"them, files and converted sets have not. Leave out the source, or the head "
                    f"(--model.heads.{head} null)"
                )


def _first_picture(source: Source) -> Image | None:
    """The first picture of the first records that can be read; None where these have none."""

    def pictures() -> Iterator[Image]:
        for index in range(min(LOOKED_AT, len(source))):
            try:
                yield from source.record(index).images
            except RecordError:
                continue  # it will be counted and listed when it is met in training

    return next(pictures(), None)
