"""Descriptions of scenes, and documents that need no picture."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import get_args

from lit_vlm.worlds.scenes.pairs import DEPTH_MARGIN, PICTURE_MARGIN, Measure, clear_pairs, state_relation
from lit_vlm.worlds.scenes.questions import Question
from lit_vlm.worlds.scenes.wording import NUMBERS, Phrase, enumerate_looks, references, sentence, the
from lit_vlm.worlds.scenes.world import Scene, Thing

MAX_RELATIONS = 2
"""Sentences in a caption that follow the list of things."""


def caption(scene: Scene, rng: random.Random) -> str:
    """A description that lists every thing once and may add how some of them stand to each other.

    Args:
        scene: what to describe.
        rng: draws the wording.
    """
    fewest = 0 if scene.wording == "varied" else MAX_RELATIONS
    relations = [relate(scene, rng) for _ in range(rng.randint(fewest, MAX_RELATIONS))]
    sentences = [_opening(scene, rng), *dict.fromkeys(relation for relation in relations if relation)]
    return " ".join(sentences)


def describe_for(scene: Scene, questions: Sequence[Question], rng: random.Random) -> str:
    """A description that answers the questions, so that they need no picture.

    Args:
        scene: what to describe.
        questions: about this scene.
        rng: draws the wording, and up to `MAX_RELATIONS` sentences that no question asked for.
    """
    facts = [relate(scene, rng) for _ in range(rng.randint(0, MAX_RELATIONS))]
    # The list of things answers questions for numbers and attributes.
    facts += [question.statement for question in questions if question.kind in ("relation", "depth", "distance")]
    rng.shuffle(facts)
    return " ".join([_list(scene, rng), *dict.fromkeys(fact for fact in facts if fact)])


def relate(scene: Scene, rng: random.Random) -> str | None:
    """A sentence about where things stand, or None if this scene offers none of the kind that was drawn."""
    plain = scene.wording == "plain"
    measure: Measure = rng.choice(get_args(Measure) if plain else ("column", "depth"))
    if not plain and rng.random() < 0.3:
        return _outermost(scene, measure, rng)
    pairs = clear_pairs(scene, measure)
    return state_relation(scene, rng.choice(pairs), measure, rng) if pairs else None


def _opening(scene: Scene, rng: random.Random) -> str:
    """A list of all things, which sometimes also says how two of them stand to each other."""
    if scene.wording == "varied" and rng.random() < 0.4:
        measure: Measure = rng.choice(("column", "depth"))
        pairs = [pair for pair in clear_pairs(scene, measure) if _looks_alone(scene, pair.less, pair.more)]
        if pairs:
            pair = rng.choice(pairs)
            less, more = f"a {Phrase.of(pair.less.look)}", f"a {Phrase.of(pair.more.look)}"
            forth, back = ("left of", "right of") if measure == "column" else ("in front of", "behind")
            told = f"{less} {forth} {more}" if rng.random() < 0.5 else f"{more} {back} {less}"
            rest = [thing.look for thing in scene.things if thing is not pair.less and thing is not pair.more]
            return sentence(f"{told}, with {enumerate_looks(rest, rng)}" if rest else told)
    return _list(scene, rng)


def _looks_alone(scene: Scene, *things: Thing) -> bool:
    """Whether no other thing looks exactly like one of these."""
    return all(sum(other.look == thing.look for other in scene.things) == 1 for thing in things)


def _list(scene: Scene, rng: random.Random) -> str:
    looks = enumerate_looks((thing.look for thing in scene.things), rng)
    number = len(scene.things)
    total = f"there is one thing: {looks}" if number == 1 else f"there are {NUMBERS[number]} things: {looks}"
    return sentence(rng.choice((looks, f"the picture shows {looks}", f"we see {looks}", total)))


def _outermost(scene: Scene, measure: Measure, rng: random.Random) -> str | None:
    """A sentence about the thing furthest left, right, in front or behind; None if no thing is so by the margin."""
    if measure == "column":
        margin, words = PICTURE_MARGIN, ("leftmost", "rightmost")
        values = [scene.camera.project(thing.centre)[0] for thing in scene.things]
    else:
        margin, words = DEPTH_MARGIN, ("closest", "farthest")
        values = [scene.camera.project((thing.x, 0.0, thing.z))[2] for thing in scene.things]
    order = sorted(range(len(values)), key=values.__getitem__)
    at_end = rng.random() < 0.5
    if at_end:
        order.reverse()
    first = scene.things[order[0]]
    if len(order) < 2 or abs(values[order[0]] - values[order[1]]) < margin or not references(scene, first):
        return None
    return sentence(f"the {words[at_end]} thing is {the(scene, first, rng)}")
