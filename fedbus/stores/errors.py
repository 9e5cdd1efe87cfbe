"""What may go wrong in a store, told apart by what the caller can do about it.

Each message is one line that says what is wrong and what to do.
"""

from pathlib import Path
from typing import Final

_REMEDY_DIRECTORY: Final = "make it a directory that exists, is writable and has space"
_REMEDY_RESTORE: Final = "restore it from a copy"
REMEDY_RESTORE_OR_MOVE: Final = f"{_REMEDY_RESTORE}, or move it away to begin anew"
"""Of what may be lost without harm."""


class StoreError(Exception):
    """A store could not do what it was asked."""


class StoreUnavailable(StoreError):
    """The store does not answer, or cannot be written: try again later, and conclude nothing from it."""

    def __init__(self, place: Path | str, reason: object, *, remedy: str = _REMEDY_DIRECTORY) -> None:
        why = getattr(reason, "strerror", None) or reason
        super().__init__(f"cannot use {place}: {why}; {remedy}")
        self.place = place


class StoreDenied(StoreError):
    """The store answers, and lets us in no further: a person has to give us the right."""

    def __init__(self, place: Path | str, reason: object, *, remedy: str) -> None:
        super().__init__(f"{place} lets us in no further: {reason}; {remedy}")
        self.place = place
        self.reason = str(reason)


class StoreCorrupt(StoreError):
    """The store answers nonsense: a person has to look."""

    def __init__(self, place: Path | str, reason: object, *, remedy: str = _REMEDY_RESTORE) -> None:
        super().__init__(f"{place} is damaged: {reason}; {remedy}")
        self.place = place


class UnknownStore(StoreError):
    """A store URL that no backend supports."""
