"""Captured predictions of a device: inputs, outputs and labels, as additional training data.

Predictions have priority: `add` never waits for the disk. It puts a copy into a bounded queue, and one thread writes
the queue in batches. If the queue or the disk is full, rows are dropped and counted; `RETRY_S` later capture resumes.

    id      increases within one opening of the store; never reused
    input   one sample, as it went into the model
    output  the prediction of the model
    label   the true value, given with the request or later as feedback

At most *max_rows*, *max_bytes* and *max_age_s* are kept. `database` describes the eviction and the counts, `reader`
how rows are read.

Durability:

    a row       survives ``kill -9`` once it is written, about 10 ms after `add`; survives a power failure once later
                feedback was written or SQLite has made a checkpoint
    feedback    survives both as soon as `label` returns
"""

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fedbus.stores.captured.database import CapturedDatabase, CapturedRow, LabelConflict, UnknownRow
from fedbus.stores.captured.reader import Label, encode_array
from fedbus.stores.errors import StoreError, StoreUnavailable

__all__ = ["CaptureStats", "CapturedData", "LabelConflict", "UnknownRow"]

MAX_ROWS: Final = 20_000
MAX_BYTES: Final = 1024**3
MAX_AGE_S: Final = 30 * 24 * 3600.0
MAX_QUEUED_ROWS: Final = 4096
MAX_QUEUED_BYTES: Final = 64 * 1024**2
RETRY_S: Final = 60.0

_BATCH_ROWS: Final = 512
_BATCH_WAIT_S: Final = 0.01
"""At a high rate, the writer waits this long for more rows: a transaction costs as much as a prediction."""
_AGE_CHECK_S: Final = 30.0
"""The interval between removals of rows that are too old."""

Array: TypeAlias = np.ndarray[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class CaptureStats:
    """The numbers of rows in the store, and of rows dropped since it was opened."""

    rows: int
    labelled: int
    dropped: int


@dataclass(frozen=True)
class _Job:
    """A job for the writer thread, run after all rows queued before."""

    work: Callable[[CapturedDatabase], Any]
    future: "Future[Any]"


class CapturedData:
    """The captured predictions in the file at *path*, which is created if it does not exist.

    *holdout_share* of the rows is not counted in the totals. The writer thread calls *on_failure* with the reason
    when capture pauses, and *on_recovery* when it resumes.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        holdout_share: float = 0.0,
        max_queued_rows: int = MAX_QUEUED_ROWS,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        retry_s: float = RETRY_S,
        on_failure: Callable[[str], None] = lambda _: None,
        on_recovery: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._max_age_s = max_age_s
        self._max_queued_bytes = max_queued_bytes
        self._retry_s = retry_s
        self._on_failure = on_failure
        self._on_recovery = on_recovery
        self._failing = False
        self._age_checked_at = 0.0
        self._last_write_at = 0.0
        self._lock = threading.Lock()
        self._queue: queue.Queue[CapturedRow | _Job | None] = queue.Queue(max_queued_rows)
        self._flush_requested = threading.Event()
        """Set while a job waits for the writer."""
        self._queued_bytes = 0
        self._dropped = 0
        self._paused_until = 0.0
        self._closed = False
        database = CapturedDatabase(path, max_rows=max_rows, max_bytes=max_bytes, holdout_share=holdout_share)
        self._next_id = database.first_id
        self._writer = threading.Thread(
            target=self._write_all, args=(database,), name=f"capture {path.name}", daemon=True
        )
        self._writer.start()

    def add(
        self, input: Array, output: Array | np.generic, label: Label | None = None, *, model_version: int
    ) -> int | None:
        """Queue a prediction without waiting for the disk. Returns its id, or None if it was dropped."""
        row = CapturedRow(0, label, model_version, time.time(), encode_array(output), encode_array(input))
        with self._lock:
            if self._closed or not self._has_room_for(row):
                self._dropped += 1
                return None
            row = CapturedRow(
                self._next_id, row.label, row.model_version, row.captured_at, row.output, row.input
            )
            try:
                self._queue.put_nowait(row)
            except queue.Full:
                self._dropped += 1
                return None
            self._next_id += 1
            self._queued_bytes += row.size_bytes
            return row.id

    async def label(self, row: int, label: Label) -> None:
        """Set the label of *row*, durably. The same label twice is no error. Raises UnknownRow and LabelConflict."""
        await self._run_in_writer(lambda database: database.label(row, label))

    async def remove_label(self, row: int) -> None:
        """Remove the label of *row*, if it has one. Raises UnknownRow."""
        await self._run_in_writer(lambda database: database.remove_label(row))

    async def counts(self) -> CaptureStats:
        """Return the present counts, including all rows added before."""
        rows, labelled = await self._run_in_writer(CapturedDatabase.counts)
        return CaptureStats(rows, labelled, self._dropped)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def dropped(self) -> int:
        """The number of rows dropped since the store was opened."""
        return self._dropped

    async def flush(self) -> None:
        """Wait until all rows added before are written."""
        await self._run_in_writer(lambda _: None)

    async def close(self) -> None:
        """Write the queued rows and close the store."""
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            await asyncio.to_thread(self._queue.put, None)
            self._flush_requested.set()
        await asyncio.to_thread(self._writer.join)

    def _has_room_for(self, row: CapturedRow) -> bool:
        paused = time.monotonic() < self._paused_until
        return not paused and self._queued_bytes + row.size_bytes <= self._max_queued_bytes

    async def _run_in_writer(self, work: Callable[[CapturedDatabase], T]) -> T:
        """Run *work* in the writer thread, after all rows queued before."""
        job = _Job(work, Future())
        await asyncio.to_thread(self._submit, job)
        result: T = await asyncio.wrap_future(job.future)
        return result

    def _submit(self, job: _Job) -> None:
        while not self._try_submit(job):
            time.sleep(0.01)  # the queue is full; the writer empties it

    def _try_submit(self, job: _Job) -> bool:
        with self._lock:  # nothing may follow the end mark that `close` queues
            if self._closed:
                raise StoreUnavailable(self._path, "the store is closed")
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                return False
            self._flush_requested.set()
            return True

    # --- writer thread ---

    def _write_all(self, database: CapturedDatabase) -> None:
        closing = False
        while not closing:
            items = self._next_items()
            closing = None in items
            self._insert_rows([item for item in items if isinstance(item, CapturedRow)], database)
            self._run_jobs([item for item in items if isinstance(item, _Job)], database)
            self._drop_aged(database)
        database.close()

    def _next_items(self) -> list[CapturedRow | _Job | None]:
        """Return the next batch: at least one item and those that follow soon; empty after a timeout."""
        try:
            items = [self._queue.get(timeout=min(_AGE_CHECK_S, self._max_age_s))]
        except queue.Empty:
            return []
        if time.monotonic() - self._last_write_at < 2 * _BATCH_WAIT_S and self._queue.qsize() < _BATCH_ROWS:
            self._flush_requested.wait(_BATCH_WAIT_S)
        self._flush_requested.clear()
        self._last_write_at = time.monotonic()
        while len(items) < _BATCH_ROWS:
            try:
                items.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return items

    def _insert_rows(self, rows: list[CapturedRow], database: CapturedDatabase) -> None:
        if not rows:
            return
        with self._lock:
            self._queued_bytes -= sum(row.size_bytes for row in rows)
        try:
            database.insert(rows)
        except (sqlite3.Error, OSError) as error:
            self._pause(len(rows), error)
        else:
            self._resume()

    def _drop_aged(self, database: CapturedDatabase) -> None:
        """Evict rows that are too old, at most once per interval."""
        now = time.monotonic()
        if now - self._age_checked_at < min(_AGE_CHECK_S, self._max_age_s / 2):
            return
        self._age_checked_at = now
        try:
            database.drop_aged(self._max_age_s)
        except (sqlite3.Error, OSError) as error:
            self._pause(0, error)

    def _resume(self) -> None:
        if self._failing:
            self._failing = False
            with self._lock:  # rows queued before the pause may end it
                self._paused_until = 0.0
            self._on_recovery()

    def _pause(self, lost_rows: int, error: Exception) -> None:
        """Pause capture after a disk error, so that it does not delay predictions."""
        with self._lock:
            self._dropped += lost_rows
            self._paused_until = time.monotonic() + self._retry_s
        if not self._failing:  # reported once, not at every retry
            self._failing = True
            self._on_failure(
                f"cannot write captured data to {self._path} ({error}); "
                "predictions go on without capture; free disk space"
            )

    def _run_jobs(self, jobs: list[_Job], database: CapturedDatabase) -> None:
        """Run all *jobs* in one transaction: one fsync for each would delay capture."""
        active = [job for job in jobs if job.future.set_running_or_notify_cancel()]
        if not active:
            return
        try:
            with database.durable_transaction():
                completions = [_run_job(job, database) for job in active]
        except (sqlite3.Error, OSError) as error:
            for job in active:
                job.future.set_exception(StoreUnavailable(self._path, error))
        else:
            for complete in completions:
                complete()


def _run_job(job: _Job, database: CapturedDatabase) -> Callable[[], None]:
    """Run *job*. Returns a function that completes its future after the commit."""
    try:
        return partial(job.future.set_result, job.work(database))
    except StoreError as error:
        return partial(job.future.set_exception, error)
