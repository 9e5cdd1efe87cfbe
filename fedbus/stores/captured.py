"""What a device was asked and what it answered: the next round's extra training data.

Predictions come first: `add` never waits, not for the disk and not for a lock that the disk
holds. It puts a copy into a bounded queue that one thread writes out in batches. When the
queue is full, or the disk is, rows are dropped and counted, and the predictions go on; a
minute later capture tries again.

    id      counted up within one opening of the store, never used twice
    input   one sample, as it went into the model
    output  what the model said
    label   what is true, if somebody said so, with the request or later

At most *max_rows* are kept. The oldest unlabelled ones go first: only rows with a label can be
trained on. What has been committed outlives ``kill -9``.
"""

import asyncio
import io
import itertools
import json
import os
import queue
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fedbus.stores.errors import StoreDamaged, StoreError, StoreUnavailable

MAX_ROWS: Final = 20_000
MAX_BYTES: Final = 1024**3
MAX_QUEUED_ROWS: Final = 4096
MAX_QUEUED_BYTES: Final = 64 * 1024**2
RETRY_S: Final = 60.0

_BATCH_ROWS: Final = 512
_PAGE_BYTES: Final = 4096
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
"""
_INSERT = (
    "INSERT INTO captured (id, label, model_version, captured_at, output, input) VALUES (?, ?, ?, ?, ?, ?)"
)
_DROP_OLDEST = (
    "DELETE FROM captured WHERE id IN (SELECT id FROM captured ORDER BY label IS NOT NULL, id LIMIT ?)"
)
_LABELLED = "SELECT input, label FROM captured WHERE label IS NOT NULL"

Array: TypeAlias = np.ndarray[Any, Any]
Label: TypeAlias = int | float | list[float]
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

    *on_failure* hears, from the writer's thread, why capture has stopped for a while.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        max_queued_rows: int = MAX_QUEUED_ROWS,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        retry_s: float = RETRY_S,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_queued_bytes = max_queued_bytes
        self._retry_s = retry_s
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._queue: queue.Queue[_Row | _Job | None] = queue.Queue(max_queued_rows)
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

    async def snapshot_labelled(self, path: Path) -> int:
        """Write all rows with a label to *path*, an .npz with ``inputs`` and ``labels``; how many there are.

        Rows whose shape is not that of the newest one are left out. Where there are none, no file is
        written, and one from before is removed.
        """
        await self._in_turn(lambda _: None)  # what was added before is in
        return await asyncio.to_thread(snapshot_labelled, self._path, path)

    async def close(self) -> None:
        """Write out what is queued; nothing is captured any more."""
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            await asyncio.to_thread(self._queue.put, None)
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
        connection.close()

    def _next_items(self) -> list[_Row | _Job | None]:
        """At least one, and whatever else is there already."""
        items = [self._queue.get()]
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
                connection.executemany(_INSERT, [row.values for row in rows])
                gone = connection.execute(_DROP_OLDEST, (excess,)).rowcount if excess else 0
        except (sqlite3.Error, OSError) as error:
            self._rest(len(rows), error)
        else:
            self._rows += len(rows) - gone

    def _rest(self, lost: int, error: Exception) -> None:
        """The disk does not take it: capture nothing for a while, instead of holding predictions up."""
        with self._lock:
            self._dropped += lost
            self._rests_until = time.monotonic() + self._retry_s
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


def snapshot_labelled(database: Path, path: Path) -> int:
    """`CapturedData.snapshot_labelled` for a process that has not opened the store itself; blocks."""
    count = 0
    if database.exists():
        with _reading(database) as connection:
            inputs, labels = _labelled(connection)
            count = len(labels)
    if count:
        _write_npz(path, inputs=inputs, labels=labels)
    else:
        path.unlink(missing_ok=True)
    return count


def count_rows(database: Path) -> int:
    """How many rows there are, for a process that has not opened the store itself; blocks."""
    with _reading(database) as connection:
        count: int = connection.execute("SELECT count(*) FROM captured").fetchone()[0]
        return count


def packed(array: Array | np.generic) -> bytes:
    """*array* in NumPy's own format, with its shape and type, and never a pickle."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def unpacked(content: bytes) -> Array:
    array: Array = np.load(io.BytesIO(content), allow_pickle=False)
    return array


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


def _label(connection: sqlite3.Connection, row: int, label: Label) -> None:
    found = connection.execute("SELECT label FROM captured WHERE id = ?", (row,)).fetchone()
    if found is None:
        raise UnknownRow(row)
    if found[0] is not None:
        if (before := json.loads(found[0])) != label:
            raise LabelContradicted(row, before)
        return
    connection.execute("UPDATE captured SET label = ? WHERE id = ?", (json.dumps(label), row))


def _runs(items: "list[_Row | _Job | None]") -> Iterator[list[_Row] | _Job]:
    """The rows that come one after another together, and the jobs between them, in order."""
    for kind, run in itertools.groupby(items, type):
        if kind is _Row:
            yield [item for item in run if isinstance(item, _Row)]
        else:
            yield from (item for item in run if isinstance(item, _Job))


@contextmanager
def _reading(database: Path) -> Iterator[sqlite3.Connection]:
    """One moment of *database*, beside the writer and without holding it up."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")
            yield connection
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(database, error) from error
    except sqlite3.DatabaseError as error:
        raise StoreDamaged(database, error) from error


def _labelled(connection: sqlite3.Connection) -> tuple[Array, Array]:
    """The inputs and labels of the rows that are shaped as the newest."""
    newest = connection.execute(f"{_LABELLED} ORDER BY id DESC LIMIT 1").fetchone()
    if newest is None:
        return np.empty(0), np.empty(0)
    (rows,) = connection.execute("SELECT count(label) FROM captured").fetchone()
    sample, label_shape = unpacked(newest[0]), np.shape(json.loads(newest[1]))
    inputs = np.empty((rows, *sample.shape), sample.dtype)
    labels: list[Label] = []
    for content, label in connection.execute(f"{_LABELLED} ORDER BY id"):
        one, truth = unpacked(content), json.loads(label)
        if one.shape == sample.shape and np.shape(truth) == label_shape:
            inputs[len(labels)] = one
            labels.append(truth)
    return inputs[: len(labels)], np.asarray(labels)


def _write_npz(path: Path, *, inputs: Array, labels: Array) -> None:
    assert not labels.dtype.hasobject, "a label is a number, or a list of numbers"
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, inputs=inputs, labels=labels)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        raise StoreUnavailable(path, error) from error
    finally:
        Path(name).unlink(missing_ok=True)
