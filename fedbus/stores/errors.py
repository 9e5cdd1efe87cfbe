"""What may go wrong in a store, told apart by what the caller can do about it.

Each message is one line that says what is wrong and what to do.
"""

from pathlib import Path


class StoreError(Exception):
    """A store could not do what it was asked."""


class StoreUnavailable(StoreError):
    """The store does not answer, or cannot be written: try again later, and conclude nothing from it."""

    def __init__(self, path: Path, reason: object) -> None:
        why = getattr(reason, "strerror", None) or reason
        super().__init__(
            f"cannot use {path}: {why}; make it a directory that exists, is writable and has space"
        )
        self.path = path


class StoreDamaged(StoreError):
    """The store answers nonsense: a person has to look."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(
            f"{path} is damaged: {reason}; restore it from a copy, or move it away to begin anew"
        )
        self.path = path
