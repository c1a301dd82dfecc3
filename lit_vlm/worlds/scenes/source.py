"""Scenes as a source of records."""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from lit_vlm.data.records import Content, Image, Message, Record, Text
from lit_vlm.data.sources.base import Source
from lit_vlm.worlds.scenes.language import caption, describe_for
from lit_vlm.worlds.scenes.maps import cell_maps
from lit_vlm.worlds.scenes.questions import QUESTION_KINDS, Question, QuestionKind, ask, ask_about
from lit_vlm.worlds.scenes.render import MIN_SIZE, Rendering, extent, render
from lit_vlm.worlds.scenes.sampling import MAX_THINGS, sample_scene
from lit_vlm.worlds.scenes.world import Scene, Wording

Kind = Literal["captions", "questions", "text", "interleaved"]
Split = Literal["train", "held_out"]
VERSION = 4
"""Goes up whenever the same arguments give other records."""
PROMPT = "Describe the scene."
LEAST_THINGS: dict[QuestionKind, int] = {"attribute": 1, "relation": 2, "depth": 2, "count": 3, "distance": 3}
"""The fewest that the largest scene may hold: pairs are compared, by distance seen from a third thing; four numbers
are offered."""


class Scenes(Source):
    """Pictures of coloured solids with text that follows from the geometry; needs no file.

    Record i depends on the arguments and i only, and not on `count`.

    Args:
        kind: `captions`: a picture and its description. `questions`: a picture and a multiple-choice question. `text`:
            a description without picture, and a question that it answers. `interleaved`: several pictures in one
            document, each followed by a question of one kind with its answer, or by the answer as a sentence.
        count: number of samples.
        seed: another seed gives other scenes.
        size: height and width of the pictures in pixels.
        split: `train` or `held_out`; the two have no scene in common.
        question_kinds: what is asked, taking turns; default: all five. Not for captions.
        shots: pictures per record; for `interleaved` only.
        images_first: all pictures in front of the text; for `interleaved` only. An ablation of VILA.
        turns: questions per record, one after the other; for `questions` and `text`. The first is of the kind whose
            turn it is, the others are of random kinds, and fewer where a scene offers no more. Options belong to the
            last one.
        max_things: the most that a scene holds, to 6: fewer are easier to tell apart. At least 1, 2 where relations or
            depth are asked for, 3 where numbers or distances are.
        wording: `varied`, or `plain`, which small models learn sooner: things go by their full names, relations are
            asked for as "which is further left", and places and distances differ more.
        thing_scale: height and width of all things against the usual ones, to 1: smaller ones take more pixels to be
            told apart. Pictures must be large enough for it, `size` × `thing_scale` at least 32.
        cropped: whether pictures are cropped to the things that they show: any size up to `size`, any shape.
        maps: cells per side of the exact maps of depth and segmentation that each picture carries, for
            `teachers.KnownMap`; default: none.
        name: what the source is reported under; default: `scenes_` and its kind.

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
        question_kinds: list[QuestionKind] | None = None,
        shots: int = 4,
        images_first: bool = False,
        turns: int = 1,
        max_things: int = MAX_THINGS,
        wording: Wording = "varied",
        thing_scale: float = 1.0,
        cropped: bool = False,
        maps: int | None = None,
        name: str | None = None,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_choice("split", split, get_args(Split))
        check_choice("wording", wording, get_args(Wording))
        for question_kind in question_kinds or ():
            check_choice("question_kinds", question_kind, QUESTION_KINDS)
        check_least("count", count, 1)
        check_least("size", size, MIN_SIZE)
        least_scale = MIN_SIZE / size
        if not least_scale <= thing_scale <= 1:
            raise ValueError(
                f"thing_scale is {thing_scale}; for pictures of {size} pixels it must be from {least_scale:.3g} to 1"
            )
        check_least("shots", shots, 1)
        check_least("turns", turns, 1)
        if turns > 1 and kind not in ("questions", "text"):
            raise ValueError(f"turns is {turns} with kind {kind!r}; only questions and text take turns")
        if question_kinds is not None and (kind == "captions" or not question_kinds):
            raise ValueError(f"question_kinds is {question_kinds!r} with kind {kind!r}; leave it out")
        asked = () if kind == "captions" else tuple(question_kinds or QUESTION_KINDS)
        least = max((LEAST_THINGS[question_kind] for question_kind in asked), default=1)
        if not least <= max_things <= MAX_THINGS:
            of = f" for questions of the kinds {', '.join(asked)}" if asked else ""
            raise ValueError(f"max_things is {max_things}; it must be from {least} to {MAX_THINGS}{of}")
        self.name, self.named = name if name is not None else f"scenes_{kind}", name is not None
        self.image_folder = Path()
        self.kind, self.count, self.seed, self.size, self.split, self.shots = kind, count, seed, size, split, shots
        if images_first and kind != "interleaved":
            raise ValueError(f"images_first is for kind interleaved, not for {kind!r}")
        self.images_first = images_first
        self.turns, self.max_things, self.wording = turns, max_things, wording
        self.thing_scale, self.cropped = thing_scale, cropped
        self.cells = maps
        if cropped and maps is not None:
            raise ValueError("maps have cells of whole pictures: leave out maps, or cropped")
        if maps is not None and (maps < 1 or size % maps):
            raise ValueError(f"maps is {maps}; pictures of {size} pixels must divide into {maps} cells a side")
        self.question_kinds = tuple(question_kinds or QUESTION_KINDS)

    def __len__(self) -> int:
        return self.count

    def record(self, index: int) -> Record:
        """Draw one sample.

        Raises:
            IndexError: if `index` is not from 0 to `count` - 1.
        """
        record, scenes = self._compose(index)
        images = iter([self._draw(scene) for scene in scenes])
        messages = tuple(
            Message(message.role, tuple(next(images) if isinstance(part, Image) else part for part in message.content))
            for message in record.messages
        )
        return Record(record.id, record.source, messages, record.options)

    def _draw(self, scene: Scene) -> Image:
        rendering = render(scene, self.size)
        image = encoded(rendering.image[extent(scene, self.size)] if self.cropped else rendering.image)
        return image if self.cells is None else replace(image, maps=cell_maps(scene, rendering, self.cells))

    def outline(self, index: int) -> Record:
        """The record without the bytes of its images, which are not drawn; raises as `record` does."""
        return self._compose(index)[0]

    def maps(self, index: int) -> list[Rendering]:
        """Pixels, depth and segmentation of a record's pictures, in their order; raises as `record` does.

        Returns:
            one rendering of `size` × `size` per picture, never cropped; none for `text`.
        """
        return [render(scene, self.size) for scene in self._compose(index)[1]]

    def fingerprint(self) -> str:
        """A hash of the arguments, which decide everything."""
        # Maps are stored beside a picture and leave the picture as it is.
        arguments = {name: value for name, value in sorted(vars(self).items()) if name not in ("image_folder", "cells")}
        # These came later: sets without them are the same as before.
        if not self.images_first:
            del arguments["images_first"]
        if self.thing_scale == 1:
            del arguments["thing_scale"]
        if not self.cropped:
            del arguments["cropped"]
        return hashlib.sha256(f"scenes-{VERSION}-{arguments}".encode()).hexdigest()[:16]

    def _compose(self, index: int) -> tuple[Record, list[Scene]]:
        """A record whose images have no bytes yet, and the scene that each image shows."""
        if not 0 <= index < self.count:
            raise IndexError(f"index is {index}; the source has {self.count} samples")
        seed = f"{self.split}-{self.kind}-{self.seed}-{index}"
        rng = random.Random(f"record-{seed}")
        question_kind = self._kind_of(index)
        if self.kind == "captions":
            return self._caption(index, seed, rng)
        if self.kind == "questions":
            return self._question(index, seed, rng, question_kind)
        if self.kind == "text":
            return self._text(index, seed, rng, question_kind), []
        return self._interleaved(index, seed, rng, question_kind)

    def _kind_of(self, index: int) -> QuestionKind:
        """The kind of a record's question; rounds of all kinds in random order give every n-th record all kinds."""
        turn, place = divmod(index, len(self.question_kinds))
        rng = random.Random(f"kinds-{self.seed}-{turn}")
        return rng.sample(self.question_kinds, len(self.question_kinds))[place]

    def _blank(self, scene: Scene) -> Image:
        if not self.cropped:
            return Image(size=(self.size, self.size))
        rows, columns = extent(scene, self.size)
        return Image(size=(columns.stop - columns.start, rows.stop - rows.start))

    def _caption(self, index: int, seed: str, rng: random.Random) -> tuple[Record, list[Scene]]:
        scene = sample_scene(seed, max_things=self.max_things, thing_scale=self.thing_scale)
        scene = replace(scene, wording=self.wording)
        user = Message("user", (self._blank(scene), Text(f"\n{PROMPT}")))
        answer = Message("assistant", (Text(caption(scene, rng)),))
        return Record(f"caption-{index}", self.name, (user, answer)), [scene]

    def _ask(self, seed: str, kind: QuestionKind, rng: random.Random) -> tuple[Scene, list[Question]]:
        """A scene and up to `turns` different questions about it."""
        scene, first = ask(kind, seed, self.max_things, self.wording, self.thing_scale)
        questions = {first.text: first}
        for _ in range(self.turns - 1):
            further = ask_about(scene, rng.choice(self.question_kinds), rng)
            if further is not None:
                questions.setdefault(further.text, further)
        return scene, list(questions.values())

    def _question(self, index: int, seed: str, rng: random.Random, kind: QuestionKind) -> tuple[Record, list[Scene]]:
        scene, questions = self._ask(seed, kind, rng)
        messages = _dialogue((self._blank(scene), Text(f"\n{questions[0].text}")), questions)
        return Record(f"{kind}-{index}", self.name, messages, questions[-1].options), [scene]

    def _text(self, index: int, seed: str, rng: random.Random, kind: QuestionKind) -> Record:
        scene, questions = self._ask(seed, kind, rng)
        description = describe_for(scene, questions, rng)
        name = f"text-{kind}-{index}"
        if rng.random() < 0.5:
            asked = [f"Question: {question.text}\nAnswer: {question.answer}" for question in questions]
            return Record(name, self.name, (Message("document", (Text("\n".join([description, *asked])),)),))
        messages = _dialogue((Text(f"{description}\n{questions[0].text}"),), questions)
        return Record(name, self.name, messages, questions[-1].options)

    def _interleaved(self, index: int, seed: str, rng: random.Random, kind: QuestionKind) -> tuple[Record, list[Scene]]:
        as_statements = rng.random() < 0.5
        content: list[Content] = []
        scenes = []
        for shot in range(self.shots):
            scene, question = ask(kind, f"{seed}-{shot}", self.max_things, self.wording, self.thing_scale)
            told = question.statement if as_statements else f"Question: {question.text}\nAnswer: {question.answer}"
            content += [self._blank(scene), Text(f"\n{told}" if shot == self.shots - 1 else f"\n{told}\n\n")]
            scenes.append(scene)
        if self.images_first:
            content.sort(key=lambda part: isinstance(part, Text))
        return Record(f"interleaved-{kind}-{index}", self.name, (Message("document", tuple(content)),)), scenes


def _dialogue(opening: tuple[Content, ...], questions: list[Question]) -> tuple[Message, ...]:
    """Messages of questions and answers in turn; `opening` holds the first question."""
    asked = [opening, *((Text(question.text),) for question in questions[1:])]
    turns = zip(asked, questions, strict=True)
    return tuple(
        message
        for content, question in turns
        for message in (Message("user", content), Message("assistant", (Text(question.answer),)))
    )


def check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{argument}: {value!r} is unknown; use {', '.join(choices)}")


def check_least(argument: str, value: int, least: int) -> None:
    """Refuse a number that is too small."""
    if value < least:
        raise ValueError(f"{argument} is {value}; it must be at least {least}")


def encoded(pixels: NDArray[np.uint8]) -> Image:
    """A picture of pixels `[rows, columns, 3]`, as a PNG."""
    height, width = pixels.shape[:2]
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return Image(data=buffer.getvalue(), size=(width, height))
