"""Delivery of the rounds of runs to experiment trackers, from the fleet and from a simulation.

Each tracker has a thread, because third-party code may block. One that fails repeatedly is disabled.
"""

import queue
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Final, TypeAlias

import structlog

from fedbus.contracts.run import RoundResult
from fedbus.domain.client_scores import ClientStatsCollector
from fedbus.stores.trackers.interface import RunEnded, TrackedRound, TrackedRun, Tracker
from fedbus.stores.trackers.local import LocalTracker

MAX_TRACKED_CLIENTS: Final = 100
"""Clients of a round whose own metrics are forwarded."""
MAX_QUEUED_EVENTS: Final = 1000
"""Events that are queued for a slow tracker; more are dropped."""
MAX_FAILURES: Final = 3
CLOSE_S: Final = 30.0

TrackerEvent: TypeAlias = TrackedRun | TrackedRound | RunEnded

log = structlog.get_logger("fedbus.training_monitor")


class TrackerThread:
    """Runs one tracker in a thread of its own. *memory* records the delivered events across restarts."""

    def __init__(self, name: str, tracker: Tracker, memory: LocalTracker) -> None:
        self._name = name
        self._tracker = tracker
        self._memory = memory
        self._queue: queue.Queue[TrackerEvent | None] = queue.Queue(MAX_QUEUED_EVENTS)
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def enqueue(self, event: TrackerEvent) -> None:
        """Queue *event* without waiting; if the queue is full, it is dropped with a warning."""
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            log.warning("Tracker queue full; dropping an event", tracker=self._name, run=event.run)

    def close(self) -> None:
        """Deliver the queued events and end the thread. Blocks for at most CLOSE_S."""
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            if self._failures < MAX_FAILURES:
                self._deliver(event)
        self._call_tracker(self._tracker.close, "close")

    def _deliver(self, event: TrackerEvent) -> None:
        step = f"round {event.round}" if isinstance(event, TrackedRound) else type(event).__name__
        self._call_tracker(lambda: self._deliver_once(event, step), step)

    def _deliver_once(self, event: TrackerEvent, step: str) -> None:
        if self._memory.was_delivered(self._name, event.run, step):
            return
        match event:
            case TrackedRun():
                self._tracker.begin(event)
            case TrackedRound():
                self._tracker.round(event)
            case RunEnded():
                self._tracker.end(event)
        self._memory.mark_delivered(self._name, event.run, step)

    def _call_tracker(self, call: Callable[[], None], step: str) -> None:
        """Call the tracker; third-party code may raise any exception, which must not affect a run."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - see above
            self._failures += 1
            reason = " ".join(str(error).split())[:300]
            log.warning("Tracker failed", tracker=self._name, step=step, reason=reason)
            if self._failures == MAX_FAILURES:
                log.warning("Tracker disabled until the monitor restarts", tracker=self._name)
        else:
            self._failures = 0


class RoundTracking:
    """Makes the tracker's view of each round of *task*, with the scores of clients over all rounds so far."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._client_stats = ClientStatsCollector()

    def track(self, run: str, result: RoundResult, *, step: int, at: datetime) -> TrackedRound:
        """Return the metrics of a round. Call this once for each round, in order."""
        self._client_stats.add_round(result)
        return TrackedRound(
            run=run,
            task=self._task,
            round=result.round,
            step=step,
            at=at,
            metrics=_round_metrics(result),
            clients=self._client_metrics(result),
        )

    def _client_metrics(self, result: RoundResult) -> dict[str, dict[str, float]]:
        """Return for each client its metrics of the round, and its reliability and contribution so far."""
        clients = sorted(result.participants.keys() | result.failures.keys())[:MAX_TRACKED_CLIENTS]
        return {client: result.client_metrics(client) | self._client_score(client) for client in clients}

    def _client_score(self, client: str) -> dict[str, float]:
        stats = self._client_stats.stats_of(client)
        scores = {"reliability": stats.reliability, "contribution": stats.contribution}
        return {name: value for name, value in scores.items() if value is not None}


def _round_metrics(result: RoundResult) -> dict[str, float]:
    """Return the metrics of the app, with ``loss`` and ``accuracy``, and those of the round itself."""
    common = {"loss": result.loss, "accuracy": result.accuracy}
    reported = result.metrics | {name: value for name, value in common.items() if value is not None}
    if result.round == 0:  # the initial model of the run: its step is that of the round before
        return reported
    return {
        **reported,
        "seconds": result.seconds,
        "clients": float(len(result.participants)),
        "failures": float(len(result.failures)),
        "samples": float(sum(result.participants.values())),
        **_update_metrics(result),
    }


def _update_metrics(result: RoundResult) -> dict[str, float]:
    """Return the counts of updates, if the mode is not ``sync``."""
    if not result.mode:
        return {}
    stale = result.staleness.values()
    return {
        "updates": float(result.updates),
        "late_merged": float(result.late_merged),
        "late_dropped": float(result.late_dropped),
        "staleness": sum(stale) / len(stale) if stale else 0.0,
    }
