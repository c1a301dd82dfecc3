"""Questions about scenes, whose answers follow from the exact geometry.

A question is asked only where its answer is clear: names fit one thing only, and what is compared differs by a margin.
By nature some answers are likelier: a small thing hides less, so it may stand in front more often. This is evened out:
whether the wider or the narrower of two things is the answer is drawn first, then a scene with such a pair is searched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from lit_vlm.worlds.scenes.pairs import PLAIN_WORDS, Measure, Pair, clear_pairs, state_relation
from lit_vlm.worlds.scenes.sampling import MAX_THINGS, sample_looks, sample_scene
from lit_vlm.worlds.scenes.wording import PATTERNS, Attribute, Phrase, references, sentence, the
from lit_vlm.worlds.scenes.world import COLOURS, SHAPES, Look, Scene, Thing, Wording

QuestionKind = Literal["count", "relation", "depth", "distance", "attribute"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
MAX_COUNT = 5
"""The largest answer to a question for a number."""
CHOICES = 4
TRIES = 200


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about one scene.

    Attributes:
        kind: one of `QUESTION_KINDS`.
        text: the question.
        answer: the right option.
        options: what to choose from, in random order; the answer is among them once.
        statement: the answer as a sentence of its own.
    """

    kind: QuestionKind
    text: str
    answer: str
    options: tuple[str, ...]
    statement: str


class _Setting(NamedTuple):
    """What the scenes are like that questions are looked for in; see `ask`."""

    max_things: int
    wording: Wording
    thing_scale: float


def ask(
    kind: QuestionKind,
    seed: int | str,
    max_things: int = MAX_THINGS,
    wording: Wording = "varied",
    thing_scale: float = 1.0,
) -> tuple[Scene, Question]:
    """A scene and a question about it that depend on the arguments only.

    Args:
        kind: what is asked.
        seed: another seed gives another scene.
        max_things: the most that a scene holds, up to 6; at least 2 for relations and depth, 3 for numbers and
            distances.
        wording: see `Scene`.
        thing_scale: see `sample_scene`.

    Raises:
        ValueError: if `kind` is unknown, or no scene of this seed offers a clear question.
    """
    if kind not in QUESTION_KINDS:
        raise ValueError(f"kind is {kind!r}; use one of {', '.join(QUESTION_KINDS)}")
    setting = _Setting(max_things, wording, thing_scale)
    return _ASKERS[kind](random.Random(f"question-{kind}-{seed}"), seed, setting)


def ask_about(scene: Scene, kind: QuestionKind, rng: random.Random) -> Question | None:
    """A question about a given scene, or None if the scene has no clear answer to a question of this kind.

    Answers are less balanced than those of `ask`: where a pair is compared, small things are the closer ones more
    often, and small numbers are likelier than large ones. So training may use it, and scores use `ask`.

    Args:
        scene: what to ask about.
        kind: what is asked.
        rng: draws the things and the wording.
    """
    if kind == "count":
        look = rng.choice(scene.things).look if rng.random() < 0.7 else sample_looks(rng, 1)[0]
        phrase = Phrase.of(look, rng.choice(PATTERNS[:-1]))
        number = sum(phrase.matches(thing.look) for thing in scene.things)
        largest = max(CHOICES - 1, min(MAX_COUNT, len(scene.things)))
        if number > largest:
            return None
        others = rng.sample([other for other in range(largest + 1) if other != number], CHOICES - 1)
        return _count(phrase, number, tuple(rng.sample([number, *others], CHOICES)))
    if kind == "attribute":
        return _attribute(rng, scene, rng.choice(("colour", "shape")))
    measure: Measure = rng.choice(("column", "row")) if kind == "relation" else kind
    pairs = clear_pairs(scene, measure)
    if not pairs:
        return None
    pair = rng.choice(pairs)
    return _relation(rng, scene, pair, measure) if kind == "relation" else _which_is_closer(rng, scene, pair, kind)


def _scenes(
    rng: random.Random, seed: int | str, draw_looks: Callable[[], list[Look]], setting: _Setting
) -> Iterator[Scene]:
    """Random scenes, `TRIES` at most, among which the caller looks for one with a clear question."""
    for attempt in range(TRIES):
        looks = draw_looks()
        rng.shuffle(looks)  # things placed first find room most easily
        scene = sample_scene(f"{seed}-{attempt}", looks, thing_scale=setting.thing_scale)
        yield replace(scene, wording=setting.wording)
    raise ValueError(f"seed: no scene of seed {seed!r} offers a clear question; use another")


def _random_scenes(rng: random.Random, seed: int | str, least: int, setting: _Setting) -> Iterator[Scene]:
    return _scenes(rng, seed, lambda: sample_looks(rng, rng.randint(least, setting.max_things)), setting)


def _find_pair(
    rng: random.Random, seed: int | str, measure: Measure, least: int, setting: _Setting
) -> tuple[Scene, Pair]:
    wider_is_less = rng.random() < 0.5
    for scene in _random_scenes(rng, seed, least, setting):
        pairs = [
            pair
            for pair in clear_pairs(scene, measure)
            if pair.less.radius == pair.more.radius or (pair.less.radius > pair.more.radius) == wider_is_less
        ]
        if pairs:
            return scene, rng.choice(pairs)
    raise AssertionError("unreachable: the iterator raises")


def _shuffled(rng: random.Random, *options: str) -> tuple[str, ...]:
    return tuple(rng.sample(options, len(options)))


def _ask_relation(rng: random.Random, seed: int | str, setting: _Setting) -> tuple[Scene, Question]:
    measure: Measure = "column" if rng.random() < 0.5 else "row"
    scene, pair = _find_pair(rng, seed, measure, 2, setting)
    return scene, _relation(rng, scene, pair, measure)


def _relation(rng: random.Random, scene: Scene, pair: Pair, measure: Measure) -> Question:
    if scene.wording == "plain":
        return _which_is_further(rng, scene, pair, measure)
    words = ("left", "right") if measure == "column" else ("above", "below")
    subject, other, answer = rng.choice(((pair.less, pair.more, words[0]), (pair.more, pair.less, words[1])))
    options = _shuffled(rng, *words)
    subject_name, other_name, choice = the(scene, subject, rng), the(scene, other, rng), " or ".join(options)
    if measure == "column":
        text = f"Is {subject_name} {choice} of {other_name}?"
    else:
        text = f"In the picture, is {subject_name} {choice} {other_name}?"
    return Question("relation", text, answer, options, state_relation(scene, pair, measure, rng))


def _one_of_two(rng: random.Random, scene: Scene, answer: Thing, other: Thing) -> tuple[str, tuple[str, ...]]:
    """The name of the thing that is the answer, and the names of both things as options."""
    named = the(scene, answer, rng)
    return named, _shuffled(rng, named, the(scene, other, rng))


def _which_is_further(rng: random.Random, scene: Scene, pair: Pair, measure: Measure) -> Question:
    answer, options = _one_of_two(rng, scene, pair.less, pair.more)
    text = f"Which is {PLAIN_WORDS[measure]}, {' or '.join(options)}?"
    return Question("relation", text, answer, options, state_relation(scene, pair, measure, rng))


def _ask_depth(rng: random.Random, seed: int | str, setting: _Setting) -> tuple[Scene, Question]:
    scene, pair = _find_pair(rng, seed, "depth", 2, setting)
    return scene, _which_is_closer(rng, scene, pair, "depth")


def _ask_distance(rng: random.Random, seed: int | str, setting: _Setting) -> tuple[Scene, Question]:
    scene, pair = _find_pair(rng, seed, "distance", 3, setting)
    return scene, _which_is_closer(rng, scene, pair, "distance")


def _which_is_closer(rng: random.Random, scene: Scene, pair: Pair, kind: Literal["depth", "distance"]) -> Question:
    target = the(scene, pair.anchor, rng) if pair.anchor is not None else "the camera"
    answer, options = _one_of_two(rng, scene, pair.less, pair.more)
    text = f"Which is closer to {target}, {' or '.join(options)}?"
    return Question(kind, text, answer, options, state_relation(scene, pair, kind, rng))


def _ask_count(rng: random.Random, seed: int | str, setting: _Setting) -> tuple[Scene, Question]:
    # Options first, then the answer among them: no number is likelier than those it is offered with.
    options = tuple(rng.sample(range(min(MAX_COUNT, setting.max_things) + 1), CHOICES))
    wanted = rng.choice(options)
    phrase = Phrase.of(sample_looks(rng, 1)[0], rng.choice(PATTERNS[:-1]))

    def looks() -> list[Look]:
        return _looks_with(rng, phrase, wanted, setting.max_things)

    return next(_scenes(rng, seed, looks, setting)), _count(phrase, wanted, options)


def _count(phrase: Phrase, number: int, options: tuple[int, ...]) -> Question:
    statement = f"there is one {phrase}" if number == 1 else f"there are {number or 'no'} {phrase.plural}"
    text = f"How many {phrase.plural} are there?"
    return Question("count", text, str(number), tuple(map(str, options)), sentence(statement))


def _looks_with(rng: random.Random, phrase: Phrase, count: int, most: int) -> list[Look]:
    """Looks of which exactly `count` match; half of the others match only a part of the phrase."""
    total = rng.randint(max(count, 1), most)
    looks: list[Look] = []
    while len(looks) < total:
        look = sample_looks(rng, 1)[0]
        taken = [part for part in (phrase.size, phrase.colour, phrase.shape) if part]
        shared = taken if len(looks) < count else [rng.choice(taken)] if rng.random() < 0.5 else []
        look = Look(
            phrase.shape if phrase.shape in shared and phrase.shape else look.shape,
            phrase.colour if phrase.colour in shared and phrase.colour else look.colour,
            phrase.size if phrase.size in shared and phrase.size else look.size,
        )
        if phrase.matches(look) == (len(looks) < count):
            looks.append(look)
    return looks


def _ask_attribute(rng: random.Random, seed: int | str, setting: _Setting) -> tuple[Scene, Question]:
    attribute: Attribute = rng.choice(("colour", "shape"))
    for scene in _random_scenes(rng, seed, 1, setting):
        if question := _attribute(rng, scene, attribute):
            return scene, question
    raise AssertionError("unreachable: the iterator raises")


def _attribute(rng: random.Random, scene: Scene, attribute: Attribute) -> Question | None:
    named = [(thing, references(scene, thing, without=attribute)) for thing in scene.things]
    named = [(thing, phrases) for thing, phrases in named if phrases]
    if not named:
        return None
    thing, phrases = rng.choice(named)
    name = f"the {rng.choice(phrases)}"
    if attribute == "shape":
        answer, options = thing.look.shape, _shuffled(rng, *SHAPES)
        statement = sentence(f"{name} is a {answer}")
        return Question("attribute", f"What shape is {name}?", answer, options, statement)
    colour = thing.look.colour
    # Colours of other things come first: one must find the right thing, and not just a colour that is there.
    seen = sorted({other.look.colour for other in scene.things} - {colour})
    unseen = [other for other in COLOURS if other != colour and other not in seen]
    others = [*rng.sample(seen, len(seen)), *rng.sample(unseen, len(unseen))][: CHOICES - 1]
    options = _shuffled(rng, colour, *others)
    statement = sentence(f"{name} is {colour}")
    return Question("attribute", f"What colour is {name}?", colour, options, statement)


_ASKERS: dict[QuestionKind, Callable[[random.Random, int | str, _Setting], tuple[Scene, Question]]] = {
    "count": _ask_count,
    "relation": _ask_relation,
    "depth": _ask_depth,
    "distance": _ask_distance,
    "attribute": _ask_attribute,
}
