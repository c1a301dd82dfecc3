"""Pieces of a template → ids and labels. Labels come from spans of characters, never from counting tokens again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_vlm.core.batch import IGNORE
from lit_vlm.data.records import Image
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.spelling import Spelling, spelling_of
from lit_vlm.data.sample.templates import Piece, Span

IMAGE_SLOT = -200
"""The id that stands for a whole image in `encode_pieces`, before it becomes the image's positions."""


def encode_pieces(pieces: Sequence[Piece], spec: InputSpec, bos: bool = True) -> tuple[list[int], list[int]]:
    """Token ids and labels, with `IMAGE_SLOT` for each image.

    Text between two images is tokenised apart from other text, as the published models were trained, but across spans.
    A token is supervised if it covers any character of a supervised span. In typed spans the letters of a special token
    stay letters.

    Args:
        pieces: from a template.
        spec: of the model; its tokenizer is used.
        bos: whether the token comes first that the tokenizer puts in front of every text, if it does.

    Returns:
        ids, and labels aligned with them.
    """
    spelling = spelling_of(spec.tokenizer)
    marks = {piece.text: None for piece in pieces if isinstance(piece, Span) and piece.mark}
    if not marks.keys() <= spelling.checked:
        spelling.check(list(marks), "the template", "warn")  # where `SampleFormat.check_marks` was not called
    ids: list[int] = []
    labels: list[int] = []
    if bos and spec.bos_id is not None:
        ids.append(spec.bos_id)
        labels.append(IGNORE)  # nothing stands before it that could predict it
    for chunk in _chunks(pieces):
        if isinstance(chunk, Image):
            ids.append(IMAGE_SLOT)
            labels.append(IGNORE)
        else:
            chunk_ids, chunk_labels = _encode_chunk(chunk, spelling)
            ids += chunk_ids
            labels += chunk_labels
    return ids, labels


def _chunks(pieces: Sequence[Piece]) -> Iterator[Image | list[Span]]:
    """Yield images, and the runs of text spans between them, in order."""
    run: list[Span] = []
    for piece in pieces:
        if isinstance(piece, Span):
            run.append(piece)
            continue
        if run:
            yield run
            run = []
        yield piece
    if run:
        yield run


def _encode_chunk(spans: list[Span], spelling: Spelling) -> tuple[list[int], list[int]]:
    text = "".join(span.text for span in spans)
    if not text:
        return [], []
    spelled = spelling.write(text)
    if found := spelling.marks_in(text, spelled):
        typed = b"".join(bytes([span.typed]) * len(span.text) for span in spans)
        meant = [index for index in found if 1 not in typed[slice(*spelled.offsets[index])]]
        if len(meant) < len(found):
            spelled = spelling.write_letters(text, spelled, meant)
    supervised = b"".join(bytes([span.supervised]) * len(span.text) for span in spans) + b"\x00"
    return spelled.ids, [
        # A token that covers no character stands in front of the next one, and is supervised if that one is.
        token if supervised[start] or (end - start > 1 and 1 in supervised[start:end]) else IGNORE
        for token, (start, end) in zip(*spelled, strict=True)
    ]
