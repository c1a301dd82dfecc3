"""A command that another package brings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar


class Verb(ABC):
    """`lit-vlm NAME ...`, by the name of a plugin's class or by the class's path.

    Attributes:
        name: as on the command line.
        about: one line for `lit-vlm --help` and `lit-vlm parts`.
    """

    name: ClassVar[str]
    about: ClassVar[str] = ""

    @abstractmethod
    def main(self, argv: Sequence[str]) -> None:
        """Run with the words behind the name; a `ValueError` or `OSError` becomes one line on the terminal."""
