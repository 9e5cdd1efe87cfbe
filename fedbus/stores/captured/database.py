"""The file of captured rows, as the one thread sees it that writes it: what comes in, what makes room, what is counted.

Room is made by one rule. The oldest rows without a label go first, since only rows with a label can be trained
on; but the newest of them, a quarter of the room (`WAITING_SHARE`), stay, because feedback to them may still come,
and then the oldest with a label go instead. So a store that is full of labelled rows takes new ones in, the
newest rows are always there, and labelled ones have three quarters of the room at the least, once they are so many.

The file also counts the rows that have come, by numbers that only grow (see `reader.TotalCounts`):
what makes room is not counted back.

    durably()    a transaction that outlives a power cut
    insert()     one that outlives the process, and is cheaper

Everything here blocks. Once it is open, it raises what SQLite raises, and what `label` says.
"""

import json
import math
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.stores.captured.reader import Label, is_held_out
from fedbus.stores.errors import StoreError
from fedbus.stores.sqlite import open_database

UNLABELLED_SHARE: Final = 0.25
"""Of the room, how much the newest rows without a label have for themselves."""

_INSERT_BATCH_ROWS: Final = 64
"""Rows in one statement: while SQLite is at it, Python is free to predict."""
_PAGE_BYTES: Final = 4096
_FILL_SHARE: Final = 0.9
"""Of *max_bytes*, how much is filled before the oldest rows make room; the rest is the database's own."""
_EVICT_SHARE: Final = 0.1
"""The share of the rows that make room at a time: to drop them one by one is slow."""
_IDS_PER_OPENING: Final = 10**10

_SCHEMA = """
CREATE TABLE IF NOT EXISTS openings (n INTEGER PRIMARY KEY AUTOINCREMENT);
CREATE TABLE IF NOT EXISTS captured (
    id INTEGER PRIMARY KEY,
    label TEXT,
    model_version INTEGER NOT NULL,
    captured_at REAL NOT NULL,
    output BLOB NOT NULL,
    input BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS first_to_go ON captured (label IS NOT NULL, id);
CREATE INDEX IF NOT EXISTS by_age ON captured (captured_at);
CREATE TABLE IF NOT EXISTS ever (
    database TEXT NOT NULL,
    labelled INTEGER NOT NULL,
    unlabelled INTEGER NOT NULL,
    holdout_share REAL NOT NULL
);
"""
_INIT_TOTALS = """
INSERT INTO ever SELECT ?, count(label), count(*) - count(label), 0 FROM captured WHERE NOT held_out(id, ?)
"""
_INSERT = "INSERT INTO captured (id, label, model_version, captured_at, output, input) VALUES "
_ONE_ROW = "(?, ?, ?, ?, ?, ?)"
_COUNT = "UPDATE ever SET labelled = labelled + ?, unlabelled = unlabelled + ?"
_DROP_AGED = "DELETE FROM captured WHERE captured_at < ?"
_DROP_UNLABELLED = """
DELETE FROM captured WHERE id IN (
    SELECT id FROM captured WHERE (label IS NOT NULL) = 0 AND id <= (
        SELECT id FROM captured WHERE (label IS NOT NULL) = 0 ORDER BY id DESC LIMIT 1 OFFSET ?
    ) ORDER BY id LIMIT ?
)
"""
_DROP_LABELLED = """
DELETE FROM captured WHERE id IN (
    SELECT id FROM captured WHERE (label IS NOT NULL) = 1 ORDER BY id LIMIT ?
)
"""


class UnknownRow(StoreError):
    """There is no such row: it was never captured, or had to make room."""

    def __init__(self, row: int) -> None:
        super().__init__(
            f"no captured prediction has the id {row}: it is unknown, or was dropped to make room"
        )
        self.row = row


class LabelConflict(StoreError):
    """The row has another label already."""

    def __init__(self, row: int, label: Label) -> None:
        super().__init__(f"captured prediction {row} is labelled {label} already: the first answer stays")
        self.row = row
        self.label = label


@dataclass(frozen=True)
class CapturedRow:
    """One prediction: *input* and *output* as `packed` makes them."""

    id: int
    label: Label | None
    model_version: int
    captured_at: float
    output: bytes
    input: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.input) + len(self.output)

    @property
    def values(self) -> tuple[object, ...]:
        label = None if self.label is None else json.dumps(self.label)
        return (self.id, label, self.model_version, self.captured_at, self.output, self.input)


class CapturedDatabase:
    """The captured rows in the file at *path*, which is made where there is none.

    Of *holdout_share* of the rows nothing is counted: no training gets them. Raises StoreUnavailable and
    StoreDamaged.
    """

    def __init__(self, path: Path, *, max_rows: int, max_bytes: int, holdout_share: float) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._holdout_share = holdout_share
        self._connection = open_database(path, lambda connection: _prepare(connection, max_bytes))
        self.first_id, self._rows = self._begin()

    def _begin(self) -> tuple[int, int]:
        """The first id of this opening, and how many rows there are.

        An id that was given out and never committed must not come back as another's: feedback to it
        would label the wrong row.
        """
        opening = self._connection.execute("INSERT INTO openings DEFAULT VALUES").lastrowid
        assert opening is not None
        if self._connection.execute("SELECT * FROM ever").fetchone() is None:
            self._connection.execute(_INIT_TOTALS, (uuid.uuid4().hex, self._holdout_share))
        self._connection.execute("UPDATE ever SET holdout_share = ?", (self._holdout_share,))
        return (opening - 1) * _IDS_PER_OPENING + 1, self.counts()[0]

    def close(self) -> None:
        self._connection.close()

    def counts(self) -> tuple[int, int]:
        """How many rows there are, and how many of them have a label."""
        rows, labelled = self._connection.execute("SELECT count(*), count(label) FROM captured").fetchone()
        return rows, labelled

    def synchronous(self) -> int:
        """How SQLite now waits for the disk: 1, when it has to; 2, at each commit."""
        found: int = self._connection.execute("PRAGMA synchronous").fetchone()[0]
        return found

    @contextmanager
    def durably(self) -> Iterator[None]:
        """One transaction: when this ends, what was done in it is on the disk, and all that was done before."""
        self._connection.execute("PRAGMA synchronous = FULL")
        try:
            with self._connection:
                self._connection.execute("BEGIN")
                yield
        finally:
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def label(self, row: int, label: Label) -> None:
        """Say what is true of *row*. The same twice is fine; raises UnknownRow and LabelContradicted."""
        found = self._connection.execute("SELECT label FROM captured WHERE id = ?", (row,)).fetchone()
        if found is None:
            raise UnknownRow(row)
        if found[0] is None:
            self._connection.execute("UPDATE captured SET label = ? WHERE id = ?", (json.dumps(label), row))
            self._connection.execute(_COUNT, (0 if is_held_out(row, self._holdout_share) else 1, 0))
        elif (before := json.loads(found[0])) != label:
            raise LabelConflict(row, before)

    def withdraw(self, row: int) -> None:
        """Forget what was said to be true of *row*; raises UnknownRow."""
        if not self._connection.execute("UPDATE captured SET label = NULL WHERE id = ?", (row,)).rowcount:
            raise UnknownRow(row)

    def insert(self, rows: list[CapturedRow]) -> None:
        """Take *rows* in, and let the oldest go where there are too many then."""
        with self._connection:
            self._connection.execute("BEGIN")
            gone = self._make_room_on_disk(sum(row.size_bytes for row in rows))
            for some in _split_batches(rows):
                self._connection.execute(*_insert_statement(some))
            self._connection.execute(_COUNT, self._counted(rows))
            there = self._rows + len(rows) - gone
            there -= self._drop(there - self._max_rows, of=self._max_rows)
        self._rows = there

    def _counted(self, rows: list[CapturedRow]) -> tuple[int, int]:
        """How many of *rows* have a label and how many have none, without those that are held out."""
        labelled = [row.label is not None for row in rows if not is_held_out(row.id, self._holdout_share)]
        return labelled.count(True), labelled.count(False)

    def _make_room_on_disk(self, needed_bytes: int) -> int:
        """Drop the oldest rows until *needed_bytes* more fit; how many went."""
        gone = 0
        while self._rows > gone and self._used_bytes() + needed_bytes > _FILL_SHARE * self._max_bytes:
            there = self._rows - gone
            gone += self._drop(max(1, int(_EVICT_SHARE * there)), of=there - 1)
        return gone

    def _drop(self, count: int, *, of: int) -> int:
        """Let *count* rows go, where there is room for so many as *of* says; how many went."""
        if count <= 0:
            return 0
        waiting = math.ceil(UNLABELLED_SHARE * of)
        gone = self._connection.execute(_DROP_UNLABELLED, (waiting, count)).rowcount
        return gone + self._connection.execute(_DROP_LABELLED, (count - gone,)).rowcount

    def drop_aged(self, max_age_s: float) -> None:
        """Let go of what is too old."""
        self._rows -= self._connection.execute(_DROP_AGED, (time.time() - max_age_s,)).rowcount

    def _used_bytes(self) -> int:
        """What the rows take of the file; pages that are free again do not count."""
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
        used: int = (pages - free) * _PAGE_BYTES
        return used


def _prepare(connection: sqlite3.Connection, max_bytes: int) -> None:
    connection.create_function("held_out", 2, is_held_out, deterministic=True)
    connection.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE_BYTES}")
    connection.executescript(_SCHEMA)


def _split_batches(rows: list[CapturedRow]) -> Iterator[list[CapturedRow]]:
    for at in range(0, len(rows), _INSERT_BATCH_ROWS):
        yield rows[at : at + _INSERT_BATCH_ROWS]


def _insert_statement(rows: list[CapturedRow]) -> tuple[str, list[object]]:
    """One statement that inserts all *rows*, and its values."""
    statement = _INSERT + ", ".join([_ONE_ROW] * len(rows))
    return statement, [value for row in rows for value in row.values]
