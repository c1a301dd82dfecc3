"""Configurations of the published models that recipes name: facts, with their sources in README.md; no weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from lit_vlm.core.hub import configurations_in

FOLDER = Path(__file__).parent


def shipped() -> AbstractContextManager[None]:
    """A context in which models are built, without weights, from the configurations of this folder.

    No hub is asked. The hub cache is used for names that are not here, and for tokenizers; a tokenizer that it lacks is
    replaced by `core.tokenizers.stand_in`.
    """
    return configurations_in(FOLDER)


def shipped_names() -> list[str]:
    """The hub names whose configuration is here."""
    return sorted("/".join(file.relative_to(FOLDER).parts[:2]) for file in FOLDER.rglob("config.json"))
