"""The errors of all stores, one class for each reaction of the caller.

Each message is one line: what is wrong, why, what to do.
"""

from pathlib import Path
from typing import Final

_REMEDY_DIRECTORY: Final = "make it a directory that exists, is writable and has space"
_REMEDY_RESTORE: Final = "restore it from a copy"
REMEDY_RESTORE_OR_MOVE: Final = f"{_REMEDY_RESTORE}, or move it to another place to start with a new one"
"""For files whose loss is harmless."""


class StoreError(Exception):
    """Base class of the errors of a store."""


class StoreUnavailable(StoreError):
    """The store does not answer or cannot be written. Retry later; nothing follows about its content."""

    def __init__(self, place: Path | str, reason: object, *, remedy: str = _REMEDY_DIRECTORY) -> None:
        cause = getattr(reason, "strerror", None) or reason
        super().__init__(f"cannot use {place}: {cause}; {remedy}")
        self.place = place


class StoreDenied(StoreError):
    """The store denies access. A person has to grant the permission."""

    def __init__(self, place: Path | str, reason: object, *, remedy: str) -> None:
        super().__init__(f"access to {place} denied: {reason}; {remedy}")
        self.place = place
        self.reason = str(reason)


class StoreCorrupt(StoreError):
    """The content of the store is invalid. A person has to repair it."""

    def __init__(self, place: Path | str, reason: object, *, remedy: str = _REMEDY_RESTORE) -> None:
        super().__init__(f"{place} is corrupt: {reason}; {remedy}")
        self.place = place


class UnknownStore(StoreError):
    """A store URL that no backend supports."""
