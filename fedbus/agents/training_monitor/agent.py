"""The training monitor: follows a task's runs round by round, and tells the trackers that people keep their curves in.

It reads the log and says nothing, so that whatever becomes of it, no run is any different. What a tracker
does with a figure is the tracker's own; one that blocks, blocks a thread of its own, and one that fails
again and again is left out until the monitor is started anew.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, TypeAlias

import structlog

from fedbus.agents.common.asyncio_tools import backoff_s, wait_for_first
from fedbus.agents.common.debug_logging import log_method_calls
from fedbus.bus.bus import Bus
from fedbus.bus.errors import FederationNotFound
from fedbus.bus.streams import lifecycle_stream
from fedbus.contracts import subjects
from fedbus.contracts.run import RUN, RoundResult, RunData, RunEvent
from fedbus.contracts.telemetry import CLIENT, CLIENT_CONTRIBUTION, CLIENT_RELIABILITY, TASK, set_gauge
from fedbus.contracts.transition import Transition
from fedbus.domain.client_scores import ClientStatsCollector
from fedbus.stores.trackers.interface import RunEnded, TrackedRound, TrackedRun, Tracker
from fedbus.stores.trackers.local import LocalTracker

MAX_TRACKED_CLIENTS: Final = 100
"""Of a round's clients, those whose own figures are kept: curves of more are read by nobody."""
MAX_QUEUED_EVENTS: Final = 1000
"""What may wait for a tracker that is slow, before it misses something."""
MAX_FAILURES: Final = 3
CLOSE_S: Final = 30.0

TrackerEvent: TypeAlias = TrackedRun | TrackedRound | RunEnded

log = structlog.get_logger("fedbus.training_monitor")


class TrackerThread:
    """One tracker, in a thread of its own. *memory* knows what it was told before."""

    def __init__(self, name: str, tracker: Tracker, memory: LocalTracker) -> None:
        self._name = name
        self._tracker = tracker
        self._memory = memory
        self._waiting: queue.Queue[TrackerEvent | None] = queue.Queue(MAX_QUEUED_EVENTS)
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, word: TrackerEvent) -> None:
        """Never waits: what does not fit is missed, and said to be."""
        try:
            self._waiting.put_nowait(word)
        except queue.Full:
            log.warning("the tracker is too slow, and misses a word", tracker=self._name, run=word.run)

    def close(self) -> None:
        """Have it take what waits, and end; blocking, for CLOSE_S at the longest."""
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while (word := self._waiting.get()) is not None:
            if self._failures < MAX_FAILURES:
                self._hand_over(word)
        self._guarded(self._tracker.close, "close")

    def _hand_over(self, word: TrackerEvent) -> None:
        what = f"round {word.round}" if isinstance(word, TrackedRound) else type(word).__name__
        self._guarded(lambda: self._once(word, what), what)

    def _once(self, word: TrackerEvent, what: str) -> None:
        if self._memory.was_delivered(self._name, word.run, what):
            return
        match word:
            case TrackedRun():
                self._tracker.begin(word)
            case TrackedRound():
                self._tracker.round(word)
            case RunEnded():
                self._tracker.end(word)
        self._memory.tell(self._name, word.run, what)

    def _guarded(self, work: Callable[[], None], what: str) -> None:
        """Somebody else's code may raise anything, and costs nobody a run."""
        try:
            work()
        except Exception as error:  # noqa: BLE001
            self._failures += 1
            log.warning(
                "a tracker failed", tracker=self._name, at=what, reason=" ".join(str(error).split())[:300]
            )
            if self._failures == MAX_FAILURES:
                log.warning("the tracker is left out until the monitor is started anew", tracker=self._name)
        else:
            self._failures = 0


@log_method_calls
class TrainingMonitor:
    """Follows the runs of *task*. *trackers* are told, by their names; *memory* is the one that is always there."""

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
        """Rounds of all runs before each run."""
        self._next_step = 0
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until *stop* is set: from the beginning of the log, since a tracker knows what it has heard."""
        self._threads = [
            TrackerThread(name, tracker, self._memory) for name, tracker in self._trackers.items()
        ]
        try:
            await wait_for_first(stop.wait(), self._follow())
        finally:
            for told in reversed(self._threads):  # the first of them is the memory of all
                await asyncio.to_thread(told.close)

    async def _follow(self) -> None:
        attempt = 0
        while True:
            try:
                await self._follow_runs()
            except FederationNotFound:  # the server side has not made its streams yet
                await asyncio.sleep(backoff_s(attempt))
                attempt += 1

    async def _follow_runs(self) -> None:
        wanted = [subjects.lifecycle(self._bus.fed, "run", ">")]
        async with self._bus.watch(lifecycle_stream(self._bus.fed), wanted, whole=True) as moves:
            self.ready.set()
            async for seen in moves:
                move = seen.message
                if (
                    isinstance(move, Transition)
                    and isinstance(move.facts, RunData)
                    and move.task == self._task
                ):
                    self._on_run_transition(move, move.facts, seen.envelope.time)

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
        self._client_stats.see(result)
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
        for client, figures in clients.items():
            about = {TASK: self._task, CLIENT: client}
            set_gauge(CLIENT_RELIABILITY, figures["reliability"], about)
            if (contribution := figures.get("contribution")) is not None:
                set_gauge(CLIENT_CONTRIBUTION, contribution, about)

    def _client_metrics(self, result: RoundResult) -> dict[str, dict[str, float]]:
        """What a round was to each client: its own figures, where its time went, and what it is worth by now."""
        asked = sorted(result.participants.keys() | result.failures.keys())[:MAX_TRACKED_CLIENTS]
        return {client: result.of_client(client) | self._client_score(client) for client in asked}

    def _client_score(self, client: str) -> dict[str, float]:
        standing = self._client_stats.of(client)
        worth = {"reliability": standing.reliability, "contribution": standing.contribution}
        return {name: value for name, value in worth.items() if value is not None}

    def _enqueue(self, word: TrackerEvent) -> None:
        for told in self._threads:
            told.tell(word)


def _round_metrics(result: RoundResult) -> dict[str, float]:
    """What the app reports, loss and accuracy under these very names, and what the round itself was like."""
    joined = {"loss": result.loss, "accuracy": result.accuracy}
    reported = result.metrics | {name: value for name, value in joined.items() if value is not None}
    if result.round == 0:  # the model that the run began with: its step is that of the round before it
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
