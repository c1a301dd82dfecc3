"""Questions: their answers worked out again from text and scene, and how evenly answers are spread."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from lit_vlm.worlds.scenes import (
    QUESTION_KINDS,
    Question,
    QuestionKind,
    Scene,
    Thing,
    ask,
    ask_about,
    caption,
    sample_scene,
)
from lit_vlm.worlds.scenes.pairs import DEPTH_MARGIN, DISTANCE_MARGIN, PICTURE_MARGIN
from lit_vlm.worlds.scenes.wording import NUMBERS
from lit_vlm.worlds.scenes.world import HALF_VIEW

COUNT = 1200


@cache
def asked(kind: QuestionKind, max_things: int = 6) -> list[tuple[Scene, Question]]:
    return [ask(kind, seed, max_things) for seed in range(COUNT)]


@cache
def all_asked(kind: QuestionKind) -> list[tuple[Scene, Question]]:
    """Those that a scene was looked for, of scenes with few things too, and those about scenes that are given."""
    scenes = [(sample_scene(f"given-{seed}"), random.Random(seed)) for seed in range(COUNT // 4)]
    given = [(scene, question) for scene, rng in scenes if (question := ask_about(scene, kind, rng))]
    assert len(given) > COUNT // 8
    return [*asked(kind), *asked(kind, 3), *given]


def fitting(scene: Scene, name: str) -> list[Thing]:
    """Things that have all the words of a name, singular or plural."""
    words = {re.sub("s$", "", word) for word in name.split()} - {"the", "a", "thing"}
    return [t for t in scene.things if words <= {t.look.size, t.look.colour, t.look.shape}]


def named(scene: Scene, name: str) -> Thing:
    (thing,) = fitting(scene, name)
    return thing


def in_camera(scene: Scene, x: float, y: float, z: float) -> tuple[float, float, float]:
    """Metres right of, above and along the viewing axis."""
    sin, cos = math.sin(scene.camera.pitch), math.cos(scene.camera.pitch)
    y -= scene.camera.height
    return x, y * cos + z * sin, z * cos - y * sin


def place(scene: Scene, thing: Thing) -> tuple[float, float]:
    """Column and row of the centre, as shares of the picture."""
    right, up, away = in_camera(scene, *thing.centre)
    return (right / away / HALF_VIEW + 1) / 2, (1 - up / away / HALF_VIEW) / 2


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_the_answer_is_among_the_options_once(kind: QuestionKind) -> None:
    for _, question in all_asked(kind):
        assert question.kind == kind
        assert question.options.count(question.answer) == 1
        assert len(set(question.options)) == len(question.options) == (4 if kind in ("count", "attribute") else 2)
        assert question.text.endswith("?")
        assert question.statement.endswith(".")


def test_counts() -> None:
    for scene, question in all_asked("count"):
        match = re.fullmatch(r"How many (.+) are there\?", question.text)
        assert match
        assert len(fitting(scene, match[1])) == int(question.answer)
    assert {question.answer for _, question in all_asked("count")} == set("012345")


def test_relations() -> None:
    pattern = (
        r"(?:In the picture, is|Is) (the .+) (left|right|above|below) or (left|right|above|below) (?:of )?(the .+)\?"
    )
    for scene, question in all_asked("relation"):
        match = re.fullmatch(pattern, question.text)
        assert match
        (column, row), (other_column, other_row) = (place(scene, named(scene, match[i])) for i in (1, 4))
        across = question.answer in ("left", "right")
        difference = other_column - column if across else other_row - row
        assert abs(difference) >= PICTURE_MARGIN - 1e-9
        assert (difference > 0) == (question.answer in ("left", "above"))
        assert {match[2], match[3]} == set(question.options)


def test_depths() -> None:
    for scene, question in all_asked("depth"):
        options = [named(scene, option) for option in question.options]
        assert question.text == f"Which is closer to the camera, {' or '.join(question.options)}?"
        grounds = [in_camera(scene, thing.x, 0.0, thing.z)[2] for thing in options]
        assert abs(grounds[0] - grounds[1]) >= DEPTH_MARGIN - 1e-9
        # The middle of the thing never says otherwise.
        centres = [in_camera(scene, *thing.centre)[2] for thing in options]
        answer = question.options.index(question.answer)
        assert answer == grounds.index(min(grounds)) == centres.index(min(centres))


def test_distances() -> None:
    for scene, question in all_asked("distance"):
        match = re.fullmatch(r"Which is closer to (the .+), the .+ or the .+\?", question.text)
        assert match
        anchor = named(scene, match[1]).centre
        distances = [math.dist(anchor, named(scene, option).centre) for option in question.options]
        assert abs(distances[0] - distances[1]) >= DISTANCE_MARGIN
        assert question.options.index(question.answer) == distances.index(min(distances))
        assert min(distances) > 0


def test_attributes() -> None:
    for scene, question in all_asked("attribute"):
        match = re.fullmatch(r"What (colour|shape) is (the .+)\?", question.text)
        assert match
        assert getattr(named(scene, match[2]).look, match[1]) == question.answer


@pytest.mark.parametrize("kind", ["relation", "depth", "distance", "attribute"])
def test_plain_wording_gives_full_names_and_right_answers(kind: QuestionKind) -> None:
    given = [(sample_scene(f"given-{seed}"), random.Random(seed)) for seed in range(200)]
    plain = [(replace(scene, wording="plain"), rng) for scene, rng in given]
    cases = [ask(kind, seed, 3, "plain") for seed in range(400)]
    cases += [(scene, question) for scene, rng in plain if (question := ask_about(scene, kind, rng))]
    axes = {"left": 0, "up": 1}
    for scene, question in cases:
        names = re.findall(r"the ((?:small |large )?(?:[a-z]+ )?[a-z]+)(?=,| or |\?)", question.text)
        names = [name for name in names if name not in ("camera", "picture")]
        assert names
        assert all(len(name.split()) == (2 if kind == "attribute" else 3) or "thing" in name for name in names)
        if kind == "relation":
            match = re.fullmatch(r"Which is further (\w+), (the .+) or (the .+)\?", question.text)
            assert match
            assert (match[2], match[3]) == question.options
            values = [place(scene, named(scene, option))[axes[match[1]]] for option in question.options]
            assert abs(values[0] - values[1]) >= 0.15 - 1e-9
            assert question.options.index(question.answer) == values.index(min(values))
        if kind == "distance":
            anchor = named(scene, question.text.split("closer to ")[1].split(",")[0]).centre
            distances = [math.dist(anchor, named(scene, option).centre) for option in question.options]
            assert abs(distances[0] - distances[1]) >= 2.0 - 1e-9
            assert question.options.index(question.answer) == distances.index(min(distances))


@pytest.mark.parametrize("max_things", [3, 6])
@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_neither_place_nor_words_of_an_option_give_the_answer_away(kind: QuestionKind, max_things: int) -> None:
    places: Counter[int] = Counter()
    offered: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for _, question in asked(kind, max_things):
        places[question.options.index(question.answer)] += 1
        words = [set(option.split()) for option in question.options]
        for index, option in enumerate(words):
            telling = option - set().union(*words[:index], *words[index + 1 :])
            offered.update(telling)
            right.update(telling if question.options[index] == question.answer else ())
    chance = 1 / len(places)
    assert all(abs(n / COUNT - chance) < 0.05 for n in places.values())
    for word, n in offered.items():
        noise = 3.5 * math.sqrt(chance * (1 - chance) / n)
        assert abs(right[word] / n - chance) < noise + 0.015, word


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_a_seed_decides_everything(kind: QuestionKind) -> None:
    assert ask(kind, "a") == ask(kind, "a")
    assert ask(kind, "a") != ask(kind, "b")


def test_scenes_hold_no_more_things_than_asked_for() -> None:
    assert {len(scene.things) for kind in QUESTION_KINDS for scene, _ in asked(kind, 3)} == {1, 2, 3}


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="kind is 'colour'; use one of count, relation"):
        ask("colour", 0)  # type: ignore[arg-type]


# ----- statements -----


def holds(scene: Scene, told: str) -> bool:
    """Whether a sentence about two or three things is true of the scene."""
    told = told.lower()
    match = re.fullmatch(r"(the .+) is closer to (the .+) than to (the .+)\.", told)
    if match:
        anchor, less, more = (named(scene, name).centre for name in match.groups())
        return math.dist(anchor, less) < math.dist(anchor, more)
    words = "left of|right of|above|below|in front of|behind|closer to the camera than|farther from the camera than"
    match = re.fullmatch(rf"(?:in the picture, )?(the .+) is ({words}) (the .+)\.", told)
    assert match, told
    a, b = named(scene, match[1]), named(scene, match[3])
    if match[2] in ("left of", "right of"):
        return (place(scene, a)[0] < place(scene, b)[0]) == (match[2] == "left of")
    if match[2] in ("above", "below"):
        return (place(scene, a)[1] < place(scene, b)[1]) == (match[2] == "above")
    return (a.z < b.z) == (match[2] in ("in front of", "closer to the camera than"))


@pytest.mark.parametrize("kind", ["relation", "depth", "distance"])
def test_statements_of_questions_are_true(kind: QuestionKind) -> None:
    for scene, question in all_asked(kind):
        assert holds(scene, question.statement), question.statement


def outermost(scene: Scene, word: str) -> Thing:
    across = word in ("leftmost", "rightmost")
    things = sorted(scene.things, key=lambda thing: place(scene, thing)[0] if across else thing.z)
    return things[0 if word in ("leftmost", "closest") else -1]


def test_captions_list_every_thing_and_tell_the_truth() -> None:
    for seed in range(500):
        scene = sample_scene(f"caption-{seed}")
        first, *others = re.findall(r".+?\.(?: |$)", caption(scene, random.Random(seed)))
        listed: Counter[str] = Counter()
        for number, size, colour, shape in re.findall(
            rf"(a|{'|'.join(NUMBERS)}) (\w+) (\w+) (\w+?)s?\b", first.lower()
        ):
            if size in ("small", "large"):
                listed[f"{size} {colour} {shape}"] += 1 if number == "a" else NUMBERS.index(number)
        assert listed == Counter(f"{t.look.size} {t.look.colour} {t.look.shape}" for t in scene.things), first
        for told in (other.strip() for other in others):
            match = re.fullmatch(r"The (leftmost|rightmost|closest|farthest) thing is (the .+)\.", told)
            assert outermost(scene, match[1]) is named(scene, match[2]) if match else holds(scene, told), told
        within = re.search(r"(a \w+ \w+ \w+) (left of|right of|in front of|behind) (a \w+ \w+ \w+)", first.lower())
        if within:
            a, relation, b = (
                part.replace("a ", "the ", 1) if part.startswith("a ") else part for part in within.groups()
            )
            assert holds(scene, f"{a} is {relation} {b}.")
