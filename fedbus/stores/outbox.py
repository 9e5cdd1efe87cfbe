"""The outbox: messages in order, on disk, until NATS acknowledges them.

The owner of an entity changes its state even while it is disconnected from NATS. Its transitions wait here,
oldest first. A message survives ``kill -9`` once `append` has returned. After a power failure the newest messages
may be missing, never one in between: a write waits for the kernel and not for the disk, and takes less than a
millisecond.

All calls block for a short time only, and may come from any thread.
"""

import json
import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fedbus.stores.errors import StoreError, StoreUnavailable
from fedbus.stores.sqlite import open_database

MAX_ENTRIES: Final = 100_000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    subject TEXT NOT NULL,
    headers TEXT NOT NULL,
    body BLOB NOT NULL
)
"""

_SELECT = "SELECT number, subject, headers, body FROM outbox"


class OutboxFull(StoreError):
    """The outbox holds its maximum number of messages: NATS was unreachable for too long."""

    def __init__(self, path: Path, entries: int) -> None:
        super().__init__(f"the outbox {path} is full with {entries} messages; restore the connection to NATS")
        self.entries = entries


@dataclass(frozen=True)
class SqliteOutboxEntry:
    """One waiting message; its number grows with every `append` and is never reused."""

    number: int
    subject: str
    headers: dict[str, str]
    body: bytes


class SqliteOutbox:
    """The waiting messages in the file at *path*, which is created if it does not exist."""

    def __init__(self, path: Path, *, max_entries: int = MAX_ENTRIES) -> None:
        self._path = path
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._connection = open_database(path, lambda connection: connection.execute(_SCHEMA))
        self._length: int = self._connection.execute("SELECT count(*) FROM outbox").fetchone()[0]

    def append(self, subject: str, headers: dict[str, str], body: bytes) -> int:
        """Append a message durably, and return its number. Raises OutboxFull and StoreUnavailable."""
        with self._lock:
            if self._length >= self._max_entries:
                raise OutboxFull(self._path, self._length)
            row = (subject, json.dumps(headers), body)
            number = self._write(
                "INSERT INTO outbox (subject, headers, body) VALUES (?, ?, ?)", row
            ).lastrowid
            assert number is not None
            self._length += 1
            return number

    def first(self) -> SqliteOutboxEntry | None:
        """Return the oldest message; None if there is none."""
        return self._read_one("ORDER BY number LIMIT 1")

    def last(self, subject: str) -> SqliteOutboxEntry | None:
        """Return the newest message on *subject*; None if there is none."""
        return self._read_one("WHERE subject = ? ORDER BY number DESC LIMIT 1", subject)

    def remove(self, number: int) -> None:
        """Remove an acknowledged message. Removing it twice is no error."""
        with self._lock:
            self._length -= self._write("DELETE FROM outbox WHERE number = ?", (number,)).rowcount

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_one(self, which: str, *values: str) -> SqliteOutboxEntry | None:
        with self._lock:
            row = self._connection.execute(f"{_SELECT} {which}", values).fetchone()
        return None if row is None else SqliteOutboxEntry(row[0], row[1], json.loads(row[2]), row[3])

    def _write(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(self._path, error) from error
