"""What a device was asked and what it answered: the next round's extra training data.

Predictions come first: `add` never waits, not for the disk and not for a lock that the disk
holds. It puts a copy into a bounded queue that one thread writes out in batches. When the
queue is full, or the disk is, rows are dropped and counted, and the predictions go on; a
minute later capture tries again.

    id      counted up within one opening of the store, never used twice
    input   one sample, as it went into the model
    output  what the model said
    label   what is true, if somebody said so, with the request or later

At most *max_rows*, *max_bytes* and *max_age_s* are kept. The oldest unlabelled ones make room first: only
rows with a label can be trained on. What has been committed outlives ``kill -9``.

How they are read, for training and else, stands in `captured_rows`.
"""

import asyncio
import itertools
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fedbus.stores.captured_rows import Label, packed, snapshot_labelled
from fedbus.stores.errors import StoreDamaged, StoreError, StoreUnavailable

MAX_ROWS: Final = 20_000
MAX_BYTES: Final = 1024**3
MAX_AGE_S: Final = 30 * 24 * 3600.0
MAX_QUEUED_ROWS: Final = 4096
MAX_QUEUED_BYTES: Final = 64 * 1024**2
RETRY_S: Final = 60.0

_BATCH_ROWS: Final = 512
_INSERTED_AT_ONCE: Final = 64
"""Rows in one statement: while SQLite is at it, Python is free to predict."""
_GATHER_S: Final = 0.01
"""Where rows come fast, the writer waits so long for more: one transaction each would cost as much as a prediction."""
_PAGE_BYTES: Final = 4096
_FULL: Final = 0.9
"""Of *max_bytes*, how much is filled before the oldest rows make room; the rest is the database's own."""
_AT_ONCE: Final = 0.1
"""The share of the rows that make room at a time: to drop them one by one is slow."""
_LOOK_S: Final = 30.0
"""How often rows are looked through for those that are too old, while nothing comes."""
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
"""
_INSERT = "INSERT INTO captured (id, label, model_version, captured_at, output, input) VALUES "
_ONE_ROW = "(?, ?, ?, ?, ?, ?)"
_DROP_AGED = "DELETE FROM captured WHERE captured_at < ?"
_DROP_OLDEST = (
    "DELETE FROM captured WHERE id IN (SELECT id FROM captured ORDER BY label IS NOT NULL, id LIMIT ?)"
)

Array: TypeAlias = np.ndarray[Any, Any]
T = TypeVar("T")


class UnknownRow(StoreError):
    """There is no such row: it was never captured, or had to make room."""

    def __init__(self, row: int) -> None:
        super().__init__(
            f"no captured prediction has the id {row}: it is unknown, or was dropped to make room"
        )
        self.row = row


class LabelContradicted(StoreError):
    """The row has another label already."""

    def __init__(self, row: int, label: Label) -> None:
        super().__init__(f"captured prediction {row} is labelled {label} already: the first answer stays")
        self.row = row
        self.label = label


@dataclass(frozen=True)
class Counts:
    """What the store holds, and what it could not take since it was opened."""

    rows: int
    labelled: int
    dropped: int


@dataclass(frozen=True)
class _Row:
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


@dataclass(frozen=True)
class _Job:
    """Something else for the writer to do, in its turn."""

    work: Callable[[sqlite3.Connection], Any]
    done: "Future[Any]"


class CapturedData:
    """The captured predictions in the file at *path*, which is made where there is none.

    *on_failure* hears, from the writer's thread, why capture has stopped for a while; *on_recovery*, that it
    goes on.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        max_queued_rows: int = MAX_QUEUED_ROWS,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        retry_s: float = RETRY_S,
        on_failure: Callable[[str], None] = lambda _: None,
        on_recovery: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._max_queued_bytes = max_queued_bytes
        self._retry_s = retry_s
        self._on_failure = on_failure
        self._on_recovery = on_recovery
        self._failing = False
        self._looked_at = 0.0
        self._wrote = 0.0
        self._lock = threading.Lock()
        self._queue: queue.Queue[_Row | _Job | None] = queue.Queue(max_queued_rows)
        self._hurry = threading.Event()
        """Somebody waits for what is written."""
        self._queued_bytes = 0
        self._dropped = 0
        self._rests_until = 0.0
        self._closed = False
        connection = _opened(path, max_bytes)
        self._next_id, self._rows = _begin(connection)
        self._writer = threading.Thread(
            target=self._write_all, args=(connection,), name=f"capture {path.name}", daemon=True
        )
        self._writer.start()

    def add(
        self, input: Array, output: Array | np.generic, label: Label | None = None, *, model_version: int
    ) -> int | None:
        """The id under which this prediction will be kept; None where it cannot be. Never waits for the disk."""
        row = _Row(0, label, model_version, time.time(), packed(output), packed(input))
        with self._lock:
            if self._closed or not self._has_room_for(row):
                self._dropped += 1
                return None
            row = _Row(self._next_id, row.label, row.model_version, row.captured_at, row.output, row.input)
            try:
                self._queue.put_nowait(row)
            except queue.Full:
                self._dropped += 1
                return None
            self._next_id += 1
            self._queued_bytes += row.size_bytes
            return row.id

    async def label(self, row: int, label: Label) -> None:
        """Say what is true of *row*. The same twice is fine; raises UnknownRow and LabelContradicted."""
        await self._in_turn(lambda connection: _label(connection, row, label))

    async def counts(self) -> Counts:
        """What is there now, with all that was added before."""
        rows, labelled = await self._in_turn(
            lambda connection: connection.execute("SELECT count(*), count(label) FROM captured").fetchone()
        )
        return Counts(rows, labelled, self._dropped)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def dropped(self) -> int:
        """Rows that could not be kept since the store was opened."""
        return self._dropped

    async def written(self) -> None:
        """Wait until all that was added before is in."""
        await self._in_turn(lambda _: None)

    async def snapshot_labelled(self, path: Path) -> int:
        """Write all rows with a label to *path*, an .npz with ``inputs`` and ``labels``; how many there are.

        Rows whose shape is not that of the newest one are left out. Where there are none, no file is
        written, and one from before is removed.
        """
        await self.written()
        return await asyncio.to_thread(snapshot_labelled, self._path, path)

    async def close(self) -> None:
        """Write out what is queued; nothing is captured any more."""
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            await asyncio.to_thread(self._queue.put, None)
            self._hurry.set()
        await asyncio.to_thread(self._writer.join)

    def _has_room_for(self, row: _Row) -> bool:
        resting = time.monotonic() < self._rests_until
        return not resting and self._queued_bytes + row.size_bytes <= self._max_queued_bytes

    async def _in_turn(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Let the writer do *work* after all that was queued before."""
        job = _Job(work, Future())
        await asyncio.to_thread(self._hand_over, job)
        result: T = await asyncio.wrap_future(job.done)
        return result

    def _hand_over(self, job: _Job) -> None:
        while not self._handed_over(job):
            time.sleep(0.01)  # the queue is full: the writer is at it

    def _handed_over(self, job: _Job) -> bool:
        with self._lock:  # nothing comes after the end that `close` puts into the queue
            if self._closed:
                raise StoreUnavailable(self._path, "the store is closed")
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                return False
            self._hurry.set()
            return True

    # --- the writer's thread ------------------------------------------------------------

    def _write_all(self, connection: sqlite3.Connection) -> None:
        going_on = True
        while going_on:
            items = self._next_items()
            going_on = None not in items
            self._take_off([item for item in items if isinstance(item, _Row)])
            for rows_or_job in _runs(items):
                match rows_or_job:
                    case _Job():
                        self._do(rows_or_job, connection)
                    case rows:
                        self._keep(rows, connection)
            self._drop_aged(connection)
        connection.close()

    def _next_items(self) -> list[_Row | _Job | None]:
        """At least one, and whatever comes soon after it; nothing where nothing comes for a while."""
        try:
            items = [self._queue.get(timeout=min(_LOOK_S, self._max_age_s))]
        except queue.Empty:
            return []
        if time.monotonic() - self._wrote < 2 * _GATHER_S and self._queue.qsize() < _BATCH_ROWS:
            self._hurry.wait(_GATHER_S)
        self._hurry.clear()
        self._wrote = time.monotonic()
        while len(items) < _BATCH_ROWS:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return items

    def _take_off(self, rows: list[_Row]) -> None:
        with self._lock:
            self._queued_bytes -= sum(row.size_bytes for row in rows)

    def _keep(self, rows: list[_Row], connection: sqlite3.Connection) -> None:
        excess = max(0, self._rows + len(rows) - self._max_rows)
        try:
            with connection:
                connection.execute("BEGIN")
                gone = self._make_room(sum(row.size_bytes for row in rows), connection)
                for some in _parts(rows):
                    connection.execute(*_insertion(some))
                gone += connection.execute(_DROP_OLDEST, (excess,)).rowcount if excess > gone else 0
        except (sqlite3.Error, OSError) as error:
            self._rest(len(rows), error)
        else:
            self._rows += len(rows) - gone
            self._goes_on()

    def _make_room(self, needed_bytes: int, connection: sqlite3.Connection) -> int:
        """Drop the oldest rows until *needed_bytes* more fit; how many went."""
        gone = 0
        while self._rows > gone and _used_bytes(connection) + needed_bytes > _FULL * self._max_bytes:
            some = max(1, int(_AT_ONCE * self._rows))
            gone += connection.execute(_DROP_OLDEST, (some,)).rowcount
        return gone

    def _drop_aged(self, connection: sqlite3.Connection) -> None:
        """Let go of what is too old, now and then."""
        now = time.monotonic()
        if now - self._looked_at < min(_LOOK_S, self._max_age_s / 2):
            return
        self._looked_at = now
        try:
            self._rows -= connection.execute(_DROP_AGED, (time.time() - self._max_age_s,)).rowcount
        except (sqlite3.Error, OSError) as error:
            self._rest(0, error)

    def _goes_on(self) -> None:
        if self._failing:
            self._failing = False
            with self._lock:  # rows that were queued before the rest may be the ones that tell
                self._rests_until = 0.0
            self._on_recovery()

    def _rest(self, lost: int, error: Exception) -> None:
        """The disk does not take it: capture nothing for a while, instead of holding predictions up."""
        with self._lock:
            self._dropped += lost
            self._rests_until = time.monotonic() + self._retry_s
        if not self._failing:  # told once, however often it is tried again
            self._failing = True
            self._on_failure(
                f"{self._path} takes no more captured data ({error}): predictions go on without; free some space"
            )

    def _do(self, job: _Job, connection: sqlite3.Connection) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        try:
            result = job.work(connection)
        except StoreError as error:
            job.done.set_exception(error)
        except sqlite3.Error as error:
            job.done.set_exception(StoreUnavailable(self._path, error))
        else:
            job.done.set_result(result)


def _opened(path: Path, max_bytes: int) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.OperationalError) as error:
        raise StoreUnavailable(path, error) from error
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE_BYTES}")
        connection.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        connection.close()
        raise StoreUnavailable(path, error) from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise StoreDamaged(path, error) from error
    return connection


def _begin(connection: sqlite3.Connection) -> tuple[int, int]:
    """The first id of this opening, and how many rows there are.

    An id that was given out and never committed must not come back as another's: feedback to it
    would label the wrong row.
    """
    opening = connection.execute("INSERT INTO openings DEFAULT VALUES").lastrowid
    assert opening is not None
    (rows,) = connection.execute("SELECT count(*) FROM captured").fetchone()
    return (opening - 1) * _IDS_PER_OPENING + 1, rows


def _used_bytes(connection: sqlite3.Connection) -> int:
    """What the rows take of the file; pages that are free again do not count."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    used: int = (pages - free) * _PAGE_BYTES
    return used


def _label(connection: sqlite3.Connection, row: int, label: Label) -> None:
    found = connection.execute("SELECT label FROM captured WHERE id = ?", (row,)).fetchone()
    if found is None:
        raise UnknownRow(row)
    if found[0] is not None:
        if (before := json.loads(found[0])) != label:
            raise LabelContradicted(row, before)
        return
    connection.execute("UPDATE captured SET label = ? WHERE id = ?", (json.dumps(label), row))


def _parts(rows: list[_Row]) -> Iterator[list[_Row]]:
    for at in range(0, len(rows), _INSERTED_AT_ONCE):
        yield rows[at : at + _INSERTED_AT_ONCE]


def _insertion(rows: list[_Row]) -> tuple[str, list[object]]:
    """One statement that inserts all *rows*, and its values."""
    statement = _INSERT + ", ".join([_ONE_ROW] * len(rows))
    return statement, [value for row in rows for value in row.values]


def _runs(items: "list[_Row | _Job | None]") -> Iterator[list[_Row] | _Job]:
    """The rows that come one after another together, and the jobs between them, in order."""
    for kind, run in itertools.groupby(items, type):
        if kind is _Row:
            yield [item for item in run if isinstance(item, _Row)]
        else:
            yield from (item for item in run if isinstance(item, _Job))
