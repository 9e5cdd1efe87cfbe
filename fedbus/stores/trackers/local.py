"""The built-in tracker: a SQLite file with a row for each round, which scripts read with `read_rounds`.

It also records which events the other trackers received, so that a restarted monitor does not send them twice.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import structlog

from fedbus.stores.errors import StoreCorrupt
from fedbus.stores.sqlite import open_database
from fedbus.stores.trackers.interface import (
    RunEnded,
    TrackedRound,
    TrackedRun,
    TrackerContext,
    flatten_metrics,
)

log = structlog.get_logger("fedbus.trackers")
DATABASE_FILE: Final = "training.db"
SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS runs (
    task TEXT, run TEXT, began TEXT, trigger TEXT, code_version TEXT, config TEXT, trace_id TEXT,
    ended TEXT, state TEXT, reason TEXT, model_version INTEGER, promoted INTEGER, PRIMARY KEY (task, run));
CREATE TABLE IF NOT EXISTS rounds (
    task TEXT, run TEXT, round INTEGER, step INTEGER, at TEXT, figures TEXT, PRIMARY KEY (task, run, round));
CREATE TABLE IF NOT EXISTS delivered (
    tracker TEXT, task TEXT, run TEXT, event TEXT, PRIMARY KEY (tracker, task, run, event));
"""


class LocalTracker:
    """Stores metrics in the directory of *context*. Callers may use any thread. Raises StoreError."""

    def __init__(self, context: TrackerContext) -> None:
        self._task = context.task
        self._database = _open_database(context.directory / DATABASE_FILE)

    def begin(self, run: TrackedRun) -> None:
        self._database.execute(
            "INSERT INTO runs (task, run, began, trigger, code_version, config, trace_id) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET code_version = excluded.code_version",
            (
                run.task,
                run.run,
                run.at.isoformat(),
                run.trigger,
                run.code_version,
                json.dumps(dict(run.config)),
                run.trace_id,
            ),
        )

    def round(self, round: TrackedRound) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?)",
            (
                round.task,
                round.run,
                round.round,
                round.step,
                round.at.isoformat(),
                json.dumps(flatten_metrics(round)),
            ),
        )

    def end(self, run: RunEnded) -> None:
        self._database.execute(
            "UPDATE runs SET ended = ?, state = ?, reason = ?, model_version = ?, promoted = ?"
            " WHERE task = ? AND run = ?",
            (
                run.at.isoformat(),
                run.state,
                run.reason,
                run.model_version,
                run.promoted,
                run.task,
                run.run,
            ),
        )

    def close(self) -> None:
        """Close the database. Deliveries to other trackers are no longer recorded."""
        self._database.close()

    # --- deliveries to other trackers ---

    def was_delivered(self, tracker: str, run: str, event: str) -> bool:
        """Return whether *tracker* has received the event *event* of *run*, from this process or an earlier one."""
        rows = self._database.execute(
            "SELECT 1 FROM delivered WHERE tracker = ? AND task = ? AND run = ? AND event = ?",
            (tracker, self._task, run, event),
        )
        return rows.fetchone() is not None

    def mark_delivered(self, tracker: str, run: str, event: str) -> None:
        """Record that *tracker* has received the event *event* of *run*."""
        self._database.execute(
            "INSERT OR IGNORE INTO delivered VALUES (?, ?, ?, ?)", (tracker, self._task, run, event)
        )


def _open_database(path: Path) -> sqlite3.Connection:
    """Open the database. A corrupt file is moved aside; the monitor fills a new one from the event log."""
    try:
        return open_database(path, _prepare)
    except StoreCorrupt as error:
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                file.replace(path.with_name(f"{path.name}.damaged{suffix}"))
        log.warning(
            "Metrics database corrupt; moved to *.damaged and recreated",
            file=str(path),
            reason=str(error.__cause__),
        )
        return open_database(path, _prepare)


def _prepare(connection: sqlite3.Connection) -> None:
    connection.executescript(SCHEMA)


def read_rounds(directory: Path, task: str) -> list[dict[str, Any]]:
    """Return all rounds of *task* in *directory*, by step: ``{"run", "round", "step", "at", "loss", …}``."""
    path = directory / DATABASE_FILE
    if not path.exists():
        return []
    with closing(sqlite3.connect(path, timeout=10)) as database:
        rows = database.execute(
            "SELECT run, round, step, at, figures FROM rounds WHERE task = ? ORDER BY step", (task,)
        ).fetchall()
    return [
        {"run": run, "round": number, "step": step, "at": at, **json.loads(figures)}
        for run, number, step, at, figures in rows
    ]
