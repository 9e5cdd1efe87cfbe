"""The outbox of a simulated device: it stays when an agent crashes."""

from collections import deque
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True, slots=True)
class MemoryOutboxEntry:
    number: int
    subject: str
    headers: dict[str, str]
    body: bytes


class MemoryOutbox:
    """Messages in order, as `fedbus.stores.outbox` keeps them on disk."""

    __slots__ = ("_entries", "_numbers")

    def __init__(self) -> None:
        self._entries: deque[MemoryOutboxEntry] | None = None
        self._numbers = count(1)

    def append(self, subject: str, headers: dict[str, str], body: bytes) -> int:
        entry = MemoryOutboxEntry(next(self._numbers), subject, headers, body)
        if self._entries is None:
            self._entries = deque()
        self._entries.append(entry)
        return entry.number

    def first(self) -> MemoryOutboxEntry | None:
        return self._entries[0] if self._entries else None

    def last(self, subject: str) -> MemoryOutboxEntry | None:
        if not self._entries:
            return None
        return next((entry for entry in reversed(self._entries) if entry.subject == subject), None)

    def remove(self, number: int) -> None:
        """Remove the message *number*; no error if it is not there."""
        if not self._entries:
            return
        if self._entries[0].number == number:
            self._entries.popleft()
        else:
            self._entries = deque(entry for entry in self._entries if entry.number != number)
        if not self._entries:
            self._entries = None
