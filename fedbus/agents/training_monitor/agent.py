"""The training monitor: follows a task's runs round by round, and forwards their metrics to experiment trackers.

It reads the log and publishes nothing, so that its failure does not affect any run. A tracker that blocks, blocks
only its own thread; one that fails repeatedly is disabled until the monitor restarts.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, TypeAlias

import structlog

from fedbus.agents.common.asyncio_tools import wait_for_first
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.bus.bus import Bus
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.streams import lifecycle_stream
from fedbus.common.retry import retry
from fedbus.contracts import subjects
from fedbus.contracts.run import RUN, RoundResult, RunData, RunEvent
from fedbus.contracts.telemetry import CLIENT, CLIENT_CONTRIBUTION, CLIENT_RELIABILITY, TASK, set_gauge
from fedbus.contracts.transition import Transition
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


@log_method_calls
class TrainingMonitor:
    """Forwards the runs of *task* to *trackers*, by name, and always to the built-in tracker *memory*."""

    def __init__(
        self, bus: Bus, task: str, memory: LocalTracker, trackers: Mapping[str, Tracker] | None = None
    ) -> None:
        self._bus = bus
        self._task = task
        self._memory = memory
        self._trackers = {"local": memory, **(trackers or {})}
        self._threads: Sequence[TrackerThread] = ()
        self._client_stats = ClientStatsCollector()
        self._steps: dict[str, int] = {}
        """The number of rounds before each run, over all runs."""
        self._next_step = 0
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow the runs until *stop* is set, from the beginning of the log: delivered events are skipped."""
        self._threads = [
            TrackerThread(name, tracker, self._memory) for name, tracker in self._trackers.items()
        ]
        try:
            await wait_for_first(stop.wait(), self._follow())
        finally:
            for thread in reversed(self._threads):  # the first is the built-in tracker, which the others need
                await asyncio.to_thread(thread.close)

    async def _follow(self) -> None:
        while True:
            await retry(self._follow_runs, on=FederationNotFound)  # the server side creates the streams

    async def _follow_runs(self) -> None:
        wanted = [subjects.lifecycle(self._bus.fed, "run", ">")]
        async with self._bus.read_stream(lifecycle_stream(self._bus.fed), wanted, whole=True) as moves:
            self.ready.set()
            async for stored in moves:
                move = stored.message
                if (
                    isinstance(move, Transition)
                    and isinstance(move.facts, RunData)
                    and move.task == self._task
                ):
                    self._on_run_transition(move, move.facts, stored.envelope.time)

    def _on_run_transition(self, move: Transition, facts: RunData, at: datetime) -> None:
        if facts.run not in self._steps:
            self._steps[facts.run] = self._next_step
        match move.event:
            case RunEvent.QUORUM_REACHED:
                self._enqueue(_tracked_run(facts, at))
            case RunEvent.ROUND_FINISHED if facts.rounds:
                self._on_round_finished(facts, facts.rounds[-1], at)
        if move.target in RUN.final:
            self._enqueue(_run_ended(move, facts, at, self._next_step))

    def _on_round_finished(self, facts: RunData, result: RoundResult, at: datetime) -> None:
        step = self._steps[facts.run] + result.round
        self._next_step = max(self._next_step, step)
        self._client_stats.add_round(result)
        clients = self._client_metrics(result)
        self._enqueue(
            TrackedRound(
                run=facts.run,
                task=self._task,
                round=result.round,
                step=step,
                at=at,
                metrics=_round_metrics(result),
                clients=clients,
            )
        )
        for client, metrics in clients.items():
            attributes = {TASK: self._task, CLIENT: client}
            set_gauge(CLIENT_RELIABILITY, metrics["reliability"], attributes)
            if (contribution := metrics.get("contribution")) is not None:
                set_gauge(CLIENT_CONTRIBUTION, contribution, attributes)

    def _client_metrics(self, result: RoundResult) -> dict[str, dict[str, float]]:
        """Return for each client its metrics of the round, and its reliability and contribution so far."""
        clients = sorted(result.participants.keys() | result.failures.keys())[:MAX_TRACKED_CLIENTS]
        return {client: result.client_metrics(client) | self._client_score(client) for client in clients}

    def _client_score(self, client: str) -> dict[str, float]:
        stats = self._client_stats.stats_of(client)
        scores = {"reliability": stats.reliability, "contribution": stats.contribution}
        return {name: value for name, value in scores.items() if value is not None}

    def _enqueue(self, event: TrackerEvent) -> None:
        for thread in self._threads:
            thread.enqueue(event)


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
    }


def _tracked_run(facts: RunData, at: datetime) -> TrackedRun:
    return TrackedRun(
        run=facts.run,
        task=facts.task,
        at=at,
        trigger=facts.trigger,
        code_version=facts.code_version,
        config=facts.plan.config,
        trace_id=facts.trace_id,
    )


def _run_ended(move: Transition, facts: RunData, at: datetime, step: int) -> RunEnded:
    return RunEnded(
        run=facts.run,
        task=facts.task,
        at=at,
        state=move.target,
        reason=move.reason,
        model_version=facts.model.version if facts.model else None,
        promoted=facts.promoted,
        step=step,
    )
