"""Documents whose demonstrations tell what a picture is to be called.

Named by letters, which are bound anew in each document, a picture can but be guessed at without demonstrations. Named
by words, the colour in one document and the shape in the next, it can be half known: which of the two is asked for is
what demonstrations tell.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from lit_vlm.data.records import Content, Image, Message, Record, Text
from lit_vlm.data.sources.base import Source
from lit_vlm.worlds.scenes import Scene, render, sample_scene
from lit_vlm.worlds.scenes.language import caption
from lit_vlm.worlds.scenes.render import MIN_SIZE
from lit_vlm.worlds.scenes.sampling import sample_looks
from lit_vlm.worlds.scenes.source import Split, check_choice, check_least, encoded
from lit_vlm.worlds.scenes.world import COLOURS, SHAPES, Colour, Look, Shape

Kind = Literal["interleaved", "questions", "text"]
Attribute = Literal["colour", "shape"]
Names = Literal["letters", "words"]
ATTRIBUTES: dict[Attribute, tuple[str, ...]] = {"colour": COLOURS, "shape": SHAPES}
"""What a document may name, and its values."""
LETTERS = tuple("EFGHJKLMNOPQRSTUVXYZ")
"""What stands for a value: a single character is seldom more than one token, so a small model can learn to copy it.
A to D are names of options in answers that are kept; A, I and W are pieces of the scenes' own sentences."""
QUESTION = "What is this?"
BARE, SAID, ANSWERED = "{}", "\nThis is a {}.", f"\nQuestion: {QUESTION}\nAnswer: {{}}"
TOLD: dict[Names, tuple[str, ...]] = {"letters": (BARE, BARE, SAID, ANSWERED), "words": (BARE, ANSWERED)}
"""How a document gives the name of a picture, each as often as it stands here. Copying a letter is learnt where it
stands beside the picture, and then where words stand in between; from such documents alone a small model does not
learn it. A word must not follow from the sentence, which would say whether it is a noun."""
VALUES = 4
VERSION = 2
"""Goes up whenever the same arguments give other records."""


@dataclass(frozen=True)
class Naming:
    """A document: things, and the names for them.

    Attributes:
        attribute: what is named.
        scenes: one thing each; that of the question is the last.
        names: the letter or the word for each scene; the last letter has been given before.
        options: in random order; of letters all of the document, of words the last thing's colour and shape with
            another colour and another shape.
    """

    attribute: Attribute
    scenes: tuple[Scene, ...]
    names: tuple[str, ...]
    options: tuple[str, ...]


class Namings(Source):
    """Pictures of single things, named by letters or words for their colours or shapes; needs no file.

    Record i depends on the arguments and i only, and not on `count`. Of letters, every value of a document is shown
    before the question, which is about one of them. Of words, things are drawn freely.

    Args:
        kind: `interleaved`: a document of pictures, each with its name: alone, in a sentence (letters) or as an answer.
            `questions`: a conversation in which the name for each picture is asked; options belong to the last turn.
            `text`: the document with words in place of pictures: the value beside a bare letter, else a description.
        count: number of samples.
        seed: another seed gives other documents.
        size: height and width of the pictures in pixels.
        split: `train` or `held_out`; the two have no scene in common.
        shots: demonstrations in front of the last picture; with words also none.
        values: different values, and letters, of a document, 4 by default; guessing is right once in so many times. For
            letters only.
        attributes: what may be named, taking turns; default: colour and shape. With one of them a model need not find
            out which it is.
        names: `letters`: a letter for each value, bound anew in each document: demonstrations tell what it stands for.
            `words`: the value's own word: demonstrations tell whether colours or shapes are asked for. Four options:
            who knows the thing or which of the two is asked for is right half the time, and who knows both always.
        name: what the source is reported under; default: `namings_` and its kind.

    Raises:
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        kind: Kind,
        count: int,
        seed: int = 0,
        size: int = 96,
        split: Split = "train",
        shots: int = 4,
        values: int | None = None,
        attributes: list[Attribute] | None = None,
        names: Names = "letters",
        name: str | None = None,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_choice("split", split, get_args(Split))
        check_choice("names", names, get_args(Names))
        for attribute in attributes or ():
            check_choice("attributes", attribute, get_args(Attribute))
        check_least("count", count, 1)
        check_least("size", size, MIN_SIZE)
        if names == "words":
            check_least("shots", shots, 0)
            if values is not None:
                raise ValueError(f"values is {values} with names 'words'; letters alone have values: leave it out")
        values = values if values is not None else VALUES
        if not 2 <= values <= len(SHAPES):
            raise ValueError(f"values is {values}; it is from 2 to {len(SHAPES)}, as many as there are shapes")
        if names == "letters" and shots < values:
            raise ValueError(f"shots is {shots}; each of the {values} values is shown once at least")
        self.name, self.named = name if name is not None else f"namings_{kind}", name is not None
        self.image_folder = Path()
        self.kind, self.count, self.seed, self.size, self.split = kind, count, seed, size, split
        self.shots, self.values, self.attributes = shots, values, tuple(attributes or ATTRIBUTES)
        self.names: Names = names

    def __len__(self) -> int:
        return self.count

    def naming(self, index: int) -> Naming:
        """What a record is made from.

        Raises:
            IndexError: if `index` is not from 0 to `count` - 1.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index}; the source has {self.count} samples")
        seed = f"{self.split}-namings-{self.seed}-{index}"
        rng = random.Random(seed)
        attribute = self.attributes[index % len(self.attributes)]
        looks, names, options = (self._letters if self.names == "letters" else self._words)(attribute, rng)
        scenes = tuple(
            replace(sample_scene(f"{seed}-{place}", [look]), wording="plain") for place, look in enumerate(looks)
        )
        return Naming(attribute, scenes, tuple(names), tuple(options))

    def _letters(self, attribute: Attribute, rng: random.Random) -> tuple[list[Look], list[str], list[str]]:
        """Looks of which the last one's value has been shown, the letters for them, and all letters."""
        values = rng.sample(ATTRIBUTES[attribute], self.values)
        letters = dict(zip(values, rng.sample(LETTERS, self.values), strict=True))
        shown = [*values, *rng.choices(values, k=self.shots - self.values)]
        shown = [*rng.sample(shown, len(shown)), rng.choice(values)]
        looks = [_with(sample_looks(rng, 1)[0], attribute, value) for value in shown]
        return looks, [letters[value] for value in shown], rng.sample(list(letters.values()), self.values)

    def _words(self, attribute: Attribute, rng: random.Random) -> tuple[list[Look], list[str], list[str]]:
        """Looks, the words for them, and the words for the last one with another of each attribute."""
        looks = [sample_looks(rng, 1)[0] for _ in range(self.shots + 1)]
        options = []
        for other, values in ATTRIBUTES.items():
            right = getattr(looks[-1], other)
            options += [right, rng.choice([value for value in values if value != right])]
        return looks, [getattr(look, attribute) for look in looks], rng.sample(options, len(options))

    def record(self, index: int) -> Record:
        """Draw one sample; raises as `naming` does."""
        naming = self.naming(index)
        if self.kind == "text":
            return self._compose(index, naming, [])
        return self._compose(index, naming, [self.draw(scene) for scene in naming.scenes])

    def outline(self, index: int) -> Record:
        """The record without the bytes of its images, which are not drawn; raises as `naming` does."""
        naming = self.naming(index)
        blank = Image(size=(self.size, self.size))
        return self._compose(index, naming, [blank] * len(naming.scenes) if self.kind != "text" else [])

    def draw(self, scene: Scene) -> Image:
        """The picture of a scene."""
        return encoded(render(scene, self.size).image)

    def fingerprint(self) -> str:
        """A hash of the arguments, which decide everything."""
        arguments = {name: value for name, value in sorted(vars(self).items()) if name != "image_folder"}
        if self.names == "letters":  # words came later: sets of letters are the same as before
            del arguments["names"]
        return hashlib.sha256(f"namings-{VERSION}-{arguments}".encode()).hexdigest()[:16]

    def _compose(self, index: int, naming: Naming, images: list[Image]) -> Record:
        rng = random.Random(f"said-{self.split}-{self.seed}-{index}")
        name = f"{naming.attribute}-{index}"
        if self.kind == "questions":
            messages = [
                message
                for picture, called in zip(images, naming.names, strict=True)
                for message in (
                    Message("user", (picture, Text(f"\n{QUESTION}"))),
                    Message("assistant", (Text(called),)),
                )
            ]
            return Record(name, self.name, tuple(messages), naming.options)
        told = rng.choice(TOLD[self.names])
        value = self.names == "letters" and told == BARE
        shown: list[Content] = [*images] if images else [Text(text) for text in _described(naming, value, rng)]
        if not images and not value and told == BARE:
            told = f" {told}"  # behind a sentence
        content: list[Content] = []
        for place, (one, called) in enumerate(zip(shown, naming.names, strict=True)):
            gap = "" if place == len(shown) - 1 else "\n\n"
            content += [one, Text(f"{told.format(called)}{gap}")]
        return Record(name, self.name, (Message("document", tuple(content)),))


def _described(naming: Naming, value: bool, rng: random.Random) -> list[str]:
    """What stands for each picture in a text: the value itself, or a description."""
    if value:
        return [getattr(scene.things[0].look, naming.attribute) for scene in naming.scenes]
    return [caption(scene, rng) for scene in naming.scenes]


def _with(look: Look, attribute: Attribute, value: str) -> Look:
    """A look with another colour or shape."""
    if attribute == "colour":
        return replace(look, colour=cast(Colour, value))
    return replace(look, shape=cast(Shape, value))
