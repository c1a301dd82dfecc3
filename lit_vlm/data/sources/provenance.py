"""Where data come from: licence, origin and revision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Provenance:
    """What is known of where a source comes from; None for what is not.

    Attributes:
        licence: its licence, as an SPDX identifier (`CC-BY-4.0`) where there is one.
        origin: the address that it was published at.
        revision: the version that was taken: a commit, a tag or a date.
    """

    licence: str | None = None
    origin: str | None = None
    revision: str | None = None

    def __or__(self, other: Provenance) -> Provenance:
        """This one, changed to what `other` knows."""
        return Provenance(**self.known() | other.known())

    def known(self) -> dict[str, str]:
        """What is known, by name."""
        return {key: value for key, value in asdict(self).items() if value}


def joined(several: Iterable[Provenance]) -> Provenance:
    """What is known of a source that is made of others: what differs stands side by side."""
    known = [one.known() for one in several]
    keys = dict.fromkeys(key for one in known for key in one)
    return Provenance(**{key: "; ".join(dict.fromkeys(one[key] for one in known if key in one)) for key in keys})
