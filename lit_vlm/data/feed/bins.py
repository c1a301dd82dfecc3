"""Bins: items of several lengths, put into as few bins of one capacity as first-fit finds."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def first_fit_decreasing(
    lengths: Integers, capacity: int, images: Integers | None = None, max_images: int | None = None
) -> tuple[Integers, Integers]:
    """Pack items into bins: longest first, each into the first bin that has room.

    Bins that have room for the present length are kept in heaps, the others wait by their room until lengths are as
    short as that; so the first bin is found without looking at the others.

    Args:
        lengths: `[n]`, length of each item, not negative.
        capacity: most length of a bin; a longer item has a bin of its own.
        images: `[n]`, number of images of each item.
        max_images: most images of a bin; an item with more has a bin of its own.

    Returns:
        `[n]` the items in the order that they were packed in, and `[n]` the bin of each of these.
    """
    order = np.argsort(-lengths, kind="stable")
    if images is None or max_images is None or int(images.sum()) <= max_images:
        return order, _put(lengths[order].tolist(), [0] * len(order), capacity, 0)
    return order, _put(lengths[order].tolist(), images[order].tolist(), capacity, max_images)


def _put(lengths: list[int], counts: list[int], capacity: int, places: int) -> Integers:
    """Put items of falling length, with their numbers of images, into bins: `[n]`, the bin of each."""
    bins: list[int] = []
    room: list[int] = []
    left: list[int] = []
    # Bins with room for the present length, by the number of images that they still take.
    ready: list[list[int]] = [[] for _ in range(places + 1)]
    # The others, by their room.
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    least = capacity + 1
    for length, count in zip(lengths, counts, strict=True):
        for now in range(least - 1, length - 1, -1):
            least = now
            for place in waiting[now]:
                heappush(ready[left[place]], place)
        heaps = [heap for heap in ready[count:] if heap]
        if heaps:
            place = heappop(min(heaps))  # lists are compared by their first elements, which differ
            room[place] -= length
            left[place] -= count
        else:
            place = len(room)
            room.append(capacity - length)
            left.append(places - count)
        bins.append(place)
        if left[place] >= 0 and room[place] >= length:
            heappush(ready[left[place]], place)
        elif left[place] >= 0 and room[place] >= 0:
            waiting[room[place]].append(place)
    return np.array(bins, np.int64)
