"""Open videos: frames of one video that are asked for one after the other are decoded in one go."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

from PIL import Image as PILImage

if TYPE_CHECKING:
    from lit_vlm.data.records.film import Film


def film_module() -> ModuleType:
    """The module `lit_vlm.data.records.film`, which imports PyAV.

    Raises:
        ValueError: when PyAV is not installed.
    """
    try:
        from lit_vlm.data.records import film
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise ValueError("videos are read by PyAV, which is not installed: pip install 'lit-vlm[video]'") from error
    return film


class Videos:
    """Reads frames and leaves the last video open, so that its next frame is decoded from there; a context manager.

    One belongs to the reading of one record: an open video is never kept from one record to the next, nor shared by
    processes.
    """

    def __init__(self) -> None:
        self._film: Film | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def frame(self, file: Path, moment: float) -> PILImage.Image:
        """The frame that is shown at a moment: upright, RGB.

        Args:
            file: the video.
            moment: seconds from its first frame.

        Raises:
            RecordError: `corrupt_video` or `too_large`.
            ValueError: when PyAV is not installed.
        """
        if self._film is None or self._film.file != file:
            self.close()
            self._film = film_module().Film(file)
        assert self._film is not None
        return self._film.frame(moment)

    def close(self) -> None:
        """Close the video that is open, if any."""
        if self._film is not None:
            self._film.close()
        self._film = None
