"""The actor of Ray that does blocks.

Ray sends the code of this module to its workers (`on_ray`), which may have another version of the kit or none, and can
then say so. So nothing else of the kit is imported before that is known.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Told:
    """What actors are told of the process that gives out blocks.

    Attributes:
        version: of the kit.
        folder: that it works in, which relative paths begin at.
        variables: environment variables that actors take over.
        needs: paths that all actors must see.
        device: that models are on.
    """

    version: str
    folder: str
    variables: Mapping[str, str]
    needs: Sequence[str]
    device: str


class Worker:
    """Opens the work, and does blocks."""

    def open(self, told: Told, content: bytes) -> None:
        """Open the work.

        Args:
            told: of the process that gives out blocks.
            content: the pickled work: (device) → what does a block.

        Raises:
            ValueError: where this process cannot take part, naming its machine.
        """
        node = f"Ray node {socket.gethostname()}"
        if os.path.isdir(told.folder):
            os.chdir(told.folder)
        if told.folder not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            # Ray puts this folder first, where it may have namesakes of packages.
            sys.path[:] = [*(path for path in sys.path if path != told.folder), told.folder]
        os.environ.update(told.variables)
        _check_version(node, told.version)
        for path in told.needs:
            if not os.path.exists(path):
                raise ValueError(f"{node} does not see {path}: it must lie in a folder that all nodes share")
        try:
            self.function: Callable[[Any], Any] = pickle.loads(content)(told.device)
        except ImportError as error:
            raise ValueError(f"{node} lacks a package that this machine has ({error})") from error

    def ask(self) -> None:
        """Answer."""

    def do(self, block: Any) -> Any:
        """Do a block."""
        return self.function(block)


def _check_version(node: str, version: str) -> None:
    fix = "install the same version on all nodes, in the environment in which `ray start` runs"
    try:
        import lit_vlm
    except ImportError as error:
        raise ValueError(f"{node} cannot import lit-vlm ({error}), which is {version} here: {fix}") from error
    if lit_vlm.__version__ != version:
        raise ValueError(f"{node} has lit-vlm {lit_vlm.__version__}, here it is {version}: {fix}")
