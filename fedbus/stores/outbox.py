"""What could not be said yet: messages in order, kept on disk until the bus takes them.

A thing with one possible owner moves even while its owner is cut off from the bus. Its
transitions wait here, oldest first, and outlive the process: what `append` has returned is
there after ``kill -9``. (After a power cut the last few may be missing, and the rest is in
order: a write waits for the kernel, not for the platter, which is what keeps it well under
a millisecond.)

Everything is synchronous and short; calls may come from any thread.
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
    """As much waits as may wait: the bus has been away for very long."""

    def __init__(self, path: Path, entries: int) -> None:
        super().__init__(f"{entries} messages already wait in {path}: bring the bus back before going on")
        self.entries = entries


@dataclass(frozen=True)
class SqliteOutboxEntry:
    """One message that waits; its number grows with every `append` and is never used twice."""

    number: int
    subject: str
    headers: dict[str, str]
    body: bytes


class SqliteOutbox:
    """The messages that wait in the file at *path*, which is made where there is none."""

    def __init__(self, path: Path, *, max_entries: int = MAX_ENTRIES) -> None:
        self._path = path
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._connection = open_database(path, lambda connection: connection.execute(_SCHEMA))
        self._length: int = self._connection.execute("SELECT count(*) FROM outbox").fetchone()[0]

    def append(self, subject: str, headers: dict[str, str], body: bytes) -> int:
        """Keep a message behind all others; when this returns, it is kept."""
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
        """The oldest message, or None where nothing waits."""
        return self._one("ORDER BY number LIMIT 1")

    def last(self, subject: str) -> SqliteOutboxEntry | None:
        """The newest message on *subject*, or None where none waits."""
        return self._one("WHERE subject = ? ORDER BY number DESC LIMIT 1", subject)

    def remove(self, number: int) -> None:
        """Forget a message: the bus has it. To forget it twice is fine."""
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

    def _one(self, which: str, *values: str) -> SqliteOutboxEntry | None:
        with self._lock:
            row = self._connection.execute(f"{_SELECT} {which}", values).fetchone()
        return None if row is None else SqliteOutboxEntry(row[0], row[1], json.loads(row[2]), row[3])

    def _write(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise StoreUnavailable(self._path, error) from error
