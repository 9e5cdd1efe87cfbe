"""The database of captured rows, used by its one writer thread: insert, evict, count.

Eviction removes the oldest rows without a label first, because training needs labels. The newest unlabelled rows
stay, up to a quarter of the space (`UNLABELLED_SHARE`), because feedback for them may still arrive; then the oldest
labelled rows are removed instead. So a store full of labelled rows still takes new rows, and labelled rows keep at
least three quarters of the space once there are enough of them.

The database also counts all rows ever inserted (see `reader.TotalCounts`); eviction does not reduce these counts.

    durable_transaction()    survives a power failure
    insert()                 survives the process, and is cheaper

All methods block. After the open they raise the errors of SQLite, and those that `label` names.
"""

import json
import math
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.common.filesystem import SHARED_MODE, publish_file, temporary_file
from fedbus.stores.captured.reader import Label, is_held_out
from fedbus.stores.errors import StoreError, StoreUnavailable
from fedbus.stores.sqlite import open_database

UNLABELLED_SHARE: Final = 0.25
"""The share of the space reserved for the newest rows without a label."""

_INSERT_BATCH_ROWS: Final = 64
"""Rows in one statement; SQLite releases the GIL while it runs one."""
_PAGE_BYTES: Final = 4096
_FILL_SHARE: Final = 0.9
"""The share of *max_bytes* at which eviction starts; the rest is for SQLite itself."""
_EVICT_SHARE: Final = 0.1
"""The share of the rows evicted at a time; evicting single rows is slow."""
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
    """The row was never captured, or was evicted."""

    def __init__(self, row: int) -> None:
        super().__init__(f"no captured prediction has the id {row}; it is unknown or was evicted")
        self.row = row


class LabelConflict(StoreError):
    """The row already has a different label."""

    def __init__(self, row: int, label: Label) -> None:
        super().__init__(f"captured prediction {row} is already labelled {label}; the first label is kept")
        self.row = row
        self.label = label


@dataclass(frozen=True)
class CapturedRow:
    """One prediction; *input* and *output* come from `encode_array`."""

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
    """The captured rows in the file at *path*, which is created if it does not exist.

    *holdout_share* of the rows is not counted, since training does not use them.
    Raises StoreUnavailable and StoreCorrupt.
    """

    def __init__(self, path: Path, *, max_rows: int, max_bytes: int, holdout_share: float) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._holdout_share = holdout_share
        if not path.exists():
            _create(path, max_bytes, holdout_share)
        self._connection = open_database(path, lambda connection: _prepare(connection, max_bytes))
        self.first_id, self._rows = self._begin_opening()

    def _begin_opening(self) -> tuple[int, int]:
        """Return the first id of this opening, and the number of rows.

        An id that was returned and never committed must not be reused: feedback for it would label another row.
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
        """Return the number of rows, and the number of those with a label."""
        rows, labelled = self._connection.execute("SELECT count(*), count(label) FROM captured").fetchone()
        return rows, labelled

    @contextmanager
    def durable_transaction(self) -> Iterator[None]:
        """Run one transaction. At its end, it and all earlier ones are on disk."""
        self._connection.execute("PRAGMA synchronous = FULL")
        try:
            with self._connection:
                self._connection.execute("BEGIN")
                yield
        finally:
            self._connection.execute("PRAGMA synchronous = NORMAL")

    def label(self, row: int, label: Label) -> None:
        """Set the label of *row*. The same label twice is no error. Raises UnknownRow and LabelConflict."""
        record = self._connection.execute("SELECT label FROM captured WHERE id = ?", (row,)).fetchone()
        if record is None:
            raise UnknownRow(row)
        if record[0] is None:
            self._connection.execute("UPDATE captured SET label = ? WHERE id = ?", (json.dumps(label), row))
            self._connection.execute(_COUNT, (0 if is_held_out(row, self._holdout_share) else 1, 0))
        elif (present := json.loads(record[0])) != label:
            raise LabelConflict(row, present)

    def remove_label(self, row: int) -> None:
        """Remove the label of *row*. Raises UnknownRow."""
        if not self._connection.execute("UPDATE captured SET label = NULL WHERE id = ?", (row,)).rowcount:
            raise UnknownRow(row)

    def insert(self, rows: list[CapturedRow]) -> None:
        """Insert *rows*, and evict the oldest if there are too many."""
        with self._connection:
            self._connection.execute("BEGIN")
            evicted = self._make_room_on_disk(sum(row.size_bytes for row in rows))
            for batch in _split_batches(rows):
                self._connection.execute(*_insert_statement(batch))
            self._connection.execute(_COUNT, self._count_new(rows))
            count = self._rows + len(rows) - evicted
            count -= self._evict(count - self._max_rows, of=self._max_rows)
        self._rows = count

    def _count_new(self, rows: list[CapturedRow]) -> tuple[int, int]:
        """Return the numbers of *rows* with and without a label, without those that are held out."""
        labelled = [row.label is not None for row in rows if not is_held_out(row.id, self._holdout_share)]
        return labelled.count(True), labelled.count(False)

    def _make_room_on_disk(self, needed_bytes: int) -> int:
        """Evict rows until *needed_bytes* more fit. Returns the number of evicted rows."""
        evicted = 0
        while self._rows > evicted and self._used_bytes() + needed_bytes > _FILL_SHARE * self._max_bytes:
            count = self._rows - evicted
            evicted += self._evict(max(1, int(_EVICT_SHARE * count)), of=count - 1)
        return evicted

    def _evict(self, count: int, *, of: int) -> int:
        """Evict *count* rows, with space for *of* rows. Returns the number of evicted rows."""
        if count <= 0:
            return 0
        reserved = math.ceil(UNLABELLED_SHARE * of)
        evicted = self._connection.execute(_DROP_UNLABELLED, (reserved, count)).rowcount
        return evicted + self._connection.execute(_DROP_LABELLED, (count - evicted,)).rowcount

    def drop_aged(self, max_age_s: float) -> None:
        """Evict rows that are older than *max_age_s*."""
        self._rows -= self._connection.execute(_DROP_AGED, (time.time() - max_age_s,)).rowcount

    def _used_bytes(self) -> int:
        """Return the bytes of the file that rows use, without free pages."""
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
        used: int = (pages - free) * _PAGE_BYTES
        return used


def _create(path: Path, max_bytes: int, holdout_share: float) -> None:
    """Create the database with its tables: another process may read it as soon as the file exists."""

    def prepare(connection: sqlite3.Connection) -> None:
        _prepare(connection, max_bytes)
        connection.execute(_INIT_TOTALS, (uuid.uuid4().hex, holdout_share))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path, mode=SHARED_MODE) as part:
            open_database(part, prepare).close()
            with suppress(FileExistsError):  # another process has created it
                publish_file(part, path, durable=False, overwrite=False)
    except OSError as error:
        raise StoreUnavailable(path, error) from error


def _prepare(connection: sqlite3.Connection, max_bytes: int) -> None:
    connection.create_function("held_out", 2, is_held_out, deterministic=True)
    connection.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE_BYTES}")
    connection.executescript(_SCHEMA)


def _split_batches(rows: list[CapturedRow]) -> Iterator[list[CapturedRow]]:
    for start in range(0, len(rows), _INSERT_BATCH_ROWS):
        yield rows[start : start + _INSERT_BATCH_ROWS]


def _insert_statement(rows: list[CapturedRow]) -> tuple[str, list[object]]:
    """Return a statement that inserts all *rows*, and its values."""
    statement = _INSERT + ", ".join([_ONE_ROW] * len(rows))
    return statement, [value for row in rows for value in row.values]
