"""What steps with several limits share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.step import Step, Verdict


class Words(Mapping[int, str]):
    """Number of a record → one of a few words: details of a verdict on many records, without a string for each.

    Args:
        indices: ascending numbers of records: `[k]`.
        numbers: number of each one's word: `[k]`.
        words: the words.
    """

    def __init__(self, indices: NDArray[np.int64], numbers: NDArray[np.integer], words: Sequence[str]) -> None:
        self._indices, self._numbers, self._words = indices, numbers, words

    def __getitem__(self, index: int) -> str:
        at = int(np.searchsorted(self._indices, index))
        if at == len(self._indices) or self._indices[at] != index:
            raise KeyError(index)
        return self._words[self._numbers[at]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices.tolist())

    def __len__(self) -> int:
        return len(self._indices)


def first_of(
    limits: Mapping[str, tuple[NDArray[np.float64], NDArray[np.bool_] | None]],
    label: str,
    values: NDArray[np.float64],
) -> Verdict:
    """Drop each candidate for the first limit that it breaks.

    Args:
        limits: name of the limit, which is the reason → its values `[c]`, and who breaks it `[c]`, or None where the
            limit is not set.
        label: what the values of those that stay are.
        values: of those that stay: `[c]`.
    """
    codes, shown = np.zeros(len(values), np.int8), values.astype(np.float64)
    for code, (found, broken) in enumerate(limits.values(), start=1):
        if broken is not None:
            new = broken & (codes == 0)
            codes[new], shown[new] = code, found[new]
    return Verdict(codes, tuple(limits), shown, label)


def refuse_empty(step: Step, *others: str) -> None:
    """Refuse a step without any limit.

    Args:
        step: its public attributes are its limits, None where they are not set.
        others: attributes that are no limits.

    Raises:
        ValueError: naming the limits.
    """
    limits = {name: value for name, value in vars(step).items() if name[0] != "_" and name not in others}
    if all(value is None for value in limits.values()):
        raise ValueError(f"it drops nothing: set {' or '.join(limits)}")
