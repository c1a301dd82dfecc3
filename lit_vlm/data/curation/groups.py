"""Groups of duplicates, each with a leader: the first of the group, which stays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lit_vlm.data.curation.hashes import Codes
from lit_vlm.data.curation.neighbours import Index, Rows, Thing

CHUNK = 2048
"""Rows that are compared with each other at a time."""


def equal_groups(codes: Codes) -> Rows:
    """For each row the number of the first that is equal to it: `[n]`."""
    if not len(codes):
        return np.zeros(0, np.int64)
    whole = np.ascontiguousarray(codes).view(np.dtype((np.void, codes.shape[1]))).ravel()
    _, first, which = np.unique(whole, return_index=True, return_inverse=True)
    return first[which].astype(np.int64)


def near_groups(chunks: Iterable[Thing], index: Index[Thing]) -> Rows:
    """For each row the number of its leader: `[n]`; a leader's is its own.

    Rows are taken in order. One that is near to a leader joins the nearest; one that is near to none becomes a leader.
    So every row is near to its leader; chains of rows, each near to the next, do not make one group, as connected
    components would. Only the leaders are kept in memory.

    Args:
        chunks: codes or vectors `[n, width]`, in pieces.
        index: says what is near, and is empty.
    """
    groups, leaders, start = [np.zeros(0, np.int64)], np.zeros(0, np.int64), 0
    for chunk in (piece[at : at + CHUNK] for piece in chunks for at in range(0, len(piece), CHUNK)):
        found = index.nearest(chunk)
        own = start + np.arange(len(chunk))
        own[found >= 0] = leaders[found[found >= 0]]
        new = np.flatnonzero(found < 0)
        own[new] = start + new[_first_near(index.near(chunk[new]))]
        became = new[own[new] == start + new]
        index.add(chunk[became])
        leaders = np.concatenate([leaders, start + became])
        groups.append(own)
        start += len(chunk)
    return np.concatenate(groups)


def _first_near(near: NDArray[np.bool_]) -> Rows:
    """The first leader that each row is near to, itself if to none: `[n, n]` → `[n]`."""
    own = np.arange(len(near))
    # Rows that are near to no earlier one are leaders, and most are: only the others are looked at one by one.
    earlier = np.tril(near, -1)
    for row in np.flatnonzero(earlier.any(1)):
        before = np.flatnonzero(earlier[row])
        leading = before[own[before] == before]
        if len(leading):
            own[row] = leading[0]
    return own


def repeated(groups: Rows, owners: Rows, count: int) -> Rows:
    """For each record the first one that stays and shows one of its pictures, if all of them are shown by such: `[n]`.

    A record that shows something new stays, and so does one without pictures: its number is its own.

    Args:
        groups: the group of each picture: `[p]`.
        owners: the record of each picture, ascending: `[p]`.
        count: n.
    """
    found = np.arange(count)
    if (np.diff(owners) > 0).all():  # one picture each: no record is needed to decide on another
        _, first, which = np.unique(groups, return_index=True, return_inverse=True)
        found[owners] = owners[first[which]]
        return found
    shown: dict[int, int] = {}
    ends = np.flatnonzero(np.diff(owners, append=count)) + 1
    listed, start = groups.tolist(), 0
    for number, end in zip(owners[ends - 1].tolist(), ends.tolist(), strict=True):
        own, start = listed[start:end], end
        if all(group in shown for group in own):
            found[number] = shown[own[0]]
        else:
            for group in own:
                shown.setdefault(group, number)
    return found
