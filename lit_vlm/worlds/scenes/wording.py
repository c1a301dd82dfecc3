"""Names for things and lists of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from lit_vlm.worlds.scenes.world import Colour, Look, Scene, Shape, Size, Thing

Attribute = Literal["size", "colour", "shape"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

PATTERNS: tuple[tuple[Attribute, ...], ...] = (
    ("shape",),
    ("colour",),
    ("size",),
    ("colour", "shape"),
    ("size", "shape"),
    ("size", "colour"),
    ("size", "colour", "shape"),
)
"""The sets of attributes that a name may consist of."""


@dataclass(frozen=True)
class Phrase:
    """A name such as "small red cube", which fits every thing of that look; None leaves an attribute open."""

    size: Size | None = None
    colour: Colour | None = None
    shape: Shape | None = None

    @classmethod
    def of(cls, look: Look, pattern: Iterable[Attribute] = ATTRIBUTES) -> Phrase:
        """The name that says those attributes of a look which are in `pattern`."""
        chosen = tuple(pattern)
        return cls(
            look.size if "size" in chosen else None,
            look.colour if "colour" in chosen else None,
            look.shape if "shape" in chosen else None,
        )

    def matches(self, look: Look) -> bool:
        """Whether the name fits a thing of this look."""
        return (
            self.size in (None, look.size) and self.colour in (None, look.colour) and self.shape in (None, look.shape)
        )

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.colour, self.shape or "thing") if word)

    @property
    def plural(self) -> str:
        """The name for several things."""
        return f"{self}s"


def references(scene: Scene, thing: Thing, without: Attribute | None = None) -> list[Phrase]:
    """All names that fit this thing of the scene and no other.

    Args:
        scene: where the thing stands; its wording decides which names are allowed.
        thing: one of the scene's things.
        without: an attribute that the names may not contain.
    """
    patterns = PATTERNS if scene.wording == "varied" else [[part for part in ATTRIBUTES if part != without]]
    phrases = [Phrase.of(thing.look, pattern) for pattern in patterns if without not in pattern]
    return [phrase for phrase in phrases if sum(phrase.matches(other.look) for other in scene.things) == 1]


def the(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """One of a thing's names with its article; the thing must have one that fits it alone."""
    return f"the {rng.choice(references(scene, thing))}"


def enumerate_looks(looks: Iterable[Look], rng: random.Random) -> str:
    """All things in random order, such as "a large red cube and two small blue spheres"."""
    counts = list(Counter(looks).items())
    rng.shuffle(counts)
    names = [f"a {Phrase.of(look)}" if n == 1 else f"{NUMBERS[n]} {Phrase.of(look).plural}" for look, n in counts]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def sentence(text: str) -> str:
    """Text that begins with a capital letter and ends with a full stop."""
    return f"{text[0].upper()}{text[1:]}."
