"""Pairs of things that differ clearly in place, depth or distance, and sentences that say so."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal

from lit_vlm.worlds.scenes.wording import references, sentence, the
from lit_vlm.worlds.scenes.world import Scene, Thing

Measure = Literal["column", "row", "depth", "distance"]

PICTURE_MARGIN = 0.08
"""Share of the picture's side by which two centres differ, at least, where one is left of or above the other."""
DEPTH_MARGIN = 0.75
"""Metres along the viewing direction between the places where two things stand, at least, where one is closer."""
DISTANCE_MARGIN = 0.75
"""Metres by which two distances between centres differ, at least."""
MARGINS: dict[Measure, float] = {
    "column": PICTURE_MARGIN,
    "row": PICTURE_MARGIN,
    "depth": DEPTH_MARGIN,
    "distance": DISTANCE_MARGIN,
}
PLAIN_MARGINS: dict[Measure, float] = MARGINS | {"column": 0.15, "row": 0.15, "distance": 2.0}
"""Margins of plain wording: differences that small models learn to tell in minutes."""
PLAIN_WORDS: dict[Measure, str] = {
    "column": "further left",
    "row": "further up",
    "depth": "closer to the camera",
}
"""The words by which plain wording compares two things."""


@dataclass(frozen=True)
class Pair:
    """Two things that differ clearly.

    Attributes:
        less: the one that is further left or up, or closer.
        more: the other.
        anchor: what the distance is measured from; None for the camera or the picture.
    """

    less: Thing
    more: Thing
    anchor: Thing | None = None


def clear_pairs(scene: Scene, measure: Measure) -> list[Pair]:
    """Pairs of things that have names of their own and whose measures differ by the margin.

    Args:
        scene: where they stand.
        measure: `column` and `row` compare the centres' places in the picture, `depth` the depth of the places where
            the things stand, `distance` the distance of the centres from that of a third thing.
    """
    named = [thing for thing in scene.things if references(scene, thing)]
    anchors: list[Thing | None] = [*named] if measure == "distance" else [None]
    margin = (MARGINS if scene.wording == "varied" else PLAIN_MARGINS)[measure]
    pairs = []
    for anchor in anchors:
        values = [(_measured(scene, thing, measure, anchor), thing) for thing in named if thing is not anchor]
        for (a, less), (b, more) in itertools.permutations(values, 2):
            if b - a >= margin:
                pairs.append(Pair(less, more, anchor))
    return pairs


def _measured(scene: Scene, thing: Thing, measure: Measure, anchor: Thing | None) -> float:
    if anchor is not None:
        return math.dist(thing.centre, anchor.centre)
    if measure == "depth":
        # Of the place and not of the centre, which is closer in a tall thing: the size would hint at the answer.
        return scene.camera.project((thing.x, 0.0, thing.z))[2]
    return scene.camera.project(thing.centre)[0 if measure == "column" else 1]


def state_relation(scene: Scene, pair: Pair, measure: Measure, rng: random.Random) -> str:
    """A sentence that compares a pair; varied wording may begin with either thing, plain wording begins with `less`."""
    less, more = the(scene, pair.less, rng), the(scene, pair.more, rng)
    if pair.anchor is not None:
        return sentence(f"{the(scene, pair.anchor, rng)} is closer to {less} than to {more}")
    if scene.wording == "plain":
        return sentence(f"{less} is {PLAIN_WORDS[measure]} than {more}")
    if measure == "row":
        told = f"{less} is above {more}" if rng.random() < 0.5 else f"{more} is below {less}"
        return sentence(f"in the picture, {told}")
    words = {
        "column": (("left of", "right of"),),
        "depth": (("in front of", "behind"), ("closer to the camera than", "farther from the camera than")),
    }[measure]
    forth, back = rng.choice(words)
    return sentence(f"{less} is {forth} {more}" if rng.random() < 0.5 else f"{more} is {back} {less}")
