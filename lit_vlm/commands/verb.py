"""A command that another package brings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar


class Verb(ABC):
    """A command `lit-vlm NAME ...`, found by the class's bare name (of a plugin) or by its path.

    Attributes:
        name: name on the command line.
        about: one line for `lit-vlm parts`.
    """

    name: ClassVar[str]
    about: ClassVar[str] = ""

    @abstractmethod
    def main(self, argv: Sequence[str]) -> None:
        """Run the command; a `ValueError` or `OSError` becomes one line on the terminal.

        Args:
            argv: arguments behind the command's name.
        """
