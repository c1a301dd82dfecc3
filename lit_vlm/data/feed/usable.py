"""What can never work with the sources of a run, said before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lit_vlm.data.records import Image, RecordError
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sources.base import Source

TRIED = 8
"""Records of a source that a dry run takes through template and transform."""
WAYS_OUT = {
    "missing_image": "Set image_folder of the source to the folder that its paths are relative to",
    "too_long": "Set data.max_length larger, or data.too_long to truncate",
    "no_supervision": "Take a data.template that supervises what these records hold, or a larger data.max_length",
    "malformed": "Is this the class that reads such files? lit-vlm parts sources lists all",
    "role_order": "The data.template wants other turns than these records have",
    "missing_features": "Prepare the features of these pictures again with lit-vlm prepare targets",
    "no_map": "Only worlds.Scenes with maps draws them",
}
"""By the reason why a record cannot be used."""
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


def try_records(sources: Sequence[Source], encode: SampleEncoder, key: str, count: int = TRIED) -> list[Sample]:
    """Take a few records of each source, spread over it, through template and transform.

    Args:
        sources: of one key of the config.
        encode: what makes samples of them.
        key: of the config, for the error.
        count: records of each source.

    Returns:
        samples of each source: one with pictures and one without, where there are any.

    Raises:
        ValueError: naming a source of which no record can be used, the first reason, and the way out.
    """
    samples: list[Sample] = []
    for source in sources:
        found: dict[bool, Sample] = {}
        problems: list[RecordError] = []
        places = sorted({round(place * (len(source) - 1) / max(1, count - 1)) for place in range(count)})
        for index in places:
            try:
                for sample in encode.sequences(source.record(index), source.image_folder):
                    found.setdefault(bool(sample.grids), sample)
            except RecordError as error:
                problems.append(error)
        if not found:
            first = problems[0]
            way_out = WAYS_OUT.get(first.reason, "lit-vlm data check and lit-vlm inspect show more")
            raise ValueError(
                f"{key}: of the source '{source.name}' ({type(source).__name__} {source.path or ''}) none of the "
                f"{len(places)} records that were tried can be used; the first: {first}. {way_out}"
            )
        samples += found.values()
    return samples


def _first_picture(source: Source) -> Image | None:
    """The first picture of the first records that can be read; None where these have none."""

    def pictures() -> Iterator[Image]:
        for index in range(min(LOOKED_AT, len(source))):
            try:
                yield from source.record(index).images
            except RecordError:
                continue  # it will be counted and listed when it is met in training

    return next(pictures(), None)
