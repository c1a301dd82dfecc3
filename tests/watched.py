"""Sources that workers of Ray read: they write down who read what, and end their worker where a test asks for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lit_vlm.data.records import Record
from lit_vlm.data.sources import Texts


class Watched(Texts):
    """Documents; each read takes a while, and is a line (process, index) of the file beside them.

    While there is a file `.held` beside them, no read ends.

    Args:
        path: the documents.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._log = Path(path).with_suffix(".log")
        self._fatal = Path(path).with_suffix(".fatal")
        self._held = Path(path).with_suffix(".held")

    def record(self, index: int) -> Record:
        if self._fatal.exists() and int(self._fatal.read_text()) == index:
            os._exit(1)
        time.sleep(0.01)
        with self._log.open("a") as file:
            file.write(f"{os.getpid()} {index}\n")
        while self._held.exists():
            time.sleep(0.01)
        return super().record(index)
