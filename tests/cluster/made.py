"""A source for tests on a cluster."""

from __future__ import annotations

import time

from lit_vlm.data.records import Record
from lit_vlm.data.sources import Texts


class SlowTexts(Texts):
    """Documents that take their time, so that tasks can be killed while they convert them."""

    def record(self, index: int) -> Record:
        """One document, after a while."""
        time.sleep(0.02)
        return super().record(index)
