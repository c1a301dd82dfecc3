"""Checks before the first step of a run: errors of its sources that would fail every sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lit_vlm.data.records import Image, RecordError
from lit_vlm.data.sample.encode import Sample, SampleEncoder
from lit_vlm.data.sources.base import Source

TRIED = 8
"""Number of records of a source that a dry run takes through template and transform."""
WAYS_OUT = {
    "missing_image": "Set image_folder of the source to the folder that its paths are relative to",
    "too_long": "Set data.max_length larger, or data.too_long to truncate",
    "no_supervision": "Take a data.template that supervises what these records hold, or a larger data.max_length",
    "malformed": "Is this the class that reads such files? lit-vlm parts sources lists all",
    "role_order": "The data.template wants other turns than these records have",
    "missing_features": "Prepare the features of these pictures again with lit-vlm prepare targets",
    "no_map": "Only worlds.Scenes with maps draws them",
}
"""Reason why a record cannot be used → advice for the error."""
LOOKED_AT = 16
"""Number of records of a source in which its first picture is looked for."""


def check_sources(sources: Sequence[Source], known: Mapping[str, str], key: str) -> None:
    """Check that each source has samples, and that its first picture carries the maps that heads read.

    Args:
        sources: the sources of one key of the config.
        known: head → map that it reads, as in `InputSpec.known`.
        key: key of the config, for the error.

    Raises:
        ValueError: for a source without samples, or whose first picture lacks a map, as every sample would be dropped.
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


class Tried(NamedTuple):
    """What became of a few records of a source.

    Attributes:
        samples: the first sample with pictures and the first without, where there are any.
        problems: for each record that cannot be used, its error and whether it holds pictures.
        tried: number of records that were tried.
    """

    samples: list[Sample]
    problems: list[tuple[RecordError, bool]]
    tried: int


def try_records(source: Source, encode: SampleEncoder, key: str, count: int = TRIED) -> Tried:
    """Take a few records of a source, spread over it, through template and transform.

    Args:
        source: the source.
        encode: makes samples of its records.
        key: key of the source in the config, for the error.
        count: number of records that are tried.

    Raises:
        ValueError: where no record can be used, or none with pictures; names source, first reason and way out.
    """
    found: dict[bool, Sample] = {}
    problems: list[tuple[RecordError, bool]] = []
    places = sorted({round(place * (len(source) - 1) / max(1, count - 1)) for place in range(count)})
    for index in places:
        pictures = False
        try:
            record = source.record(index)
            pictures = bool(record.images)
            for sample in encode.sequences(record, source.image_folder):
                found.setdefault(bool(sample.grids), sample)
        except RecordError as error:
            problems.append((error, pictures))
    of_pictures = [error for error, pictures in problems if pictures]
    if not found or (of_pictures and True not in found):
        first = (of_pictures or [error for error, _ in problems])[0]
        what = "records" if not found else "records with pictures"
        way_out = WAYS_OUT.get(first.reason, "lit-vlm data check and lit-vlm inspect show more")
        raise ValueError(
            f"{key}: of the source '{source.name}' ({type(source).__name__} {source.path or ''}) none of the {what} "
            f"can be used, of {len(places)} that were tried; the first: {first}. {way_out}"
        )
    return Tried(list(found.values()), problems, len(places))


def _first_picture(source: Source) -> Image | None:
    """The first picture of the first records that can be read; None where these have none."""

    def pictures() -> Iterator[Image]:
        for index in range(min(LOOKED_AT, len(source))):
            try:
                yield from source.record(index).images
            except RecordError:
                continue  # it will be counted and listed when it is met in training

    return next(pictures(), None)
