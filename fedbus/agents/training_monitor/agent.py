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

from fedbus.agents.common.asyncio_tools import backoff, first_of
from fedbus.agents.common.debug_logging import told_step_by_step
from fedbus.bus.bus import Bus
from fedbus.bus.errors import NoFederation
from fedbus.bus.streams import life_stream
from fedbus.contracts import subjects
from fedbus.contracts.run import RUN, RoundResult, RunEvent, RunFacts
from fedbus.contracts.telemetry import CLIENT, CLIENT_CONTRIBUTION, CLIENT_RELIABILITY, TASK, note
from fedbus.contracts.transition import Transition
from fedbus.domain.client_scores import Standings
from fedbus.stores.trackers.interface import RoundSeen, RunBegun, RunEnded, Tracker
from fedbus.stores.trackers.local import LocalTracker

CLIENTS_TRACKED: Final = 100
"""Of a round's clients, those whose own figures are kept: curves of more are read by nobody."""
WORDS_WAITING: Final = 1000
"""What may wait for a tracker that is slow, before it misses something."""
FAILURES_BORNE: Final = 3
CLOSE_S: Final = 30.0

Word: TypeAlias = RunBegun | RoundSeen | RunEnded

log = structlog.get_logger("fedbus.training_monitor")


class Told:
    """One tracker, in a thread of its own. *memory* knows what it was told before."""

    def __init__(self, name: str, tracker: Tracker, memory: LocalTracker) -> None:
        self._name = name
        self._tracker = tracker
        self._memory = memory
        self._waiting: queue.Queue[Word | None] = queue.Queue(WORDS_WAITING)
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, word: Word) -> None:
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
            if self._failures < FAILURES_BORNE:
                self._hand_over(word)
        self._guarded(self._tracker.close, "close")

    def _hand_over(self, word: Word) -> None:
        what = f"round {word.round}" if isinstance(word, RoundSeen) else type(word).__name__
        self._guarded(lambda: self._once(word, what), what)

    def _once(self, word: Word, what: str) -> None:
        if self._memory.was_told(self._name, word.run, what):
            return
        match word:
            case RunBegun():
                self._tracker.begin(word)
            case RoundSeen():
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
            if self._failures == FAILURES_BORNE:
                log.warning("the tracker is left out until the monitor is started anew", tracker=self._name)
        else:
            self._failures = 0


@told_step_by_step
class TrainingMonitor:
    """Follows the runs of *task*. *trackers* are told, by their names; *memory* is the one that is always there."""

    def __init__(
        self, bus: Bus, task: str, memory: LocalTracker, trackers: Mapping[str, Tracker] | None = None
    ) -> None:
        self._bus = bus
        self._task = task
        self._memory = memory
        self._trackers = {"local": memory, **(trackers or {})}
        self._told: Sequence[Told] = ()
        self._standings = Standings()
        self._steps: dict[str, int] = {}
        """Rounds of all runs before each run."""
        self._next_step = 0
        self.ready = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Follow until *stop* is set: from the beginning of the log, since a tracker knows what it has heard."""
        self._told = [Told(name, tracker, self._memory) for name, tracker in self._trackers.items()]
        try:
            await first_of(stop.wait(), self._follow())
        finally:
            for told in reversed(self._told):  # the first of them is the memory of all
                await asyncio.to_thread(told.close)

    async def _follow(self) -> None:
        attempt = 0
        while True:
            try:
                await self._follow_runs()
            except NoFederation:  # the server side has not made its streams yet
                await asyncio.sleep(backoff(attempt))
                attempt += 1

    async def _follow_runs(self) -> None:
        wanted = [subjects.life(self._bus.fed, "run", ">")]
        async with self._bus.watch(life_stream(self._bus.fed), wanted, whole=True) as moves:
            self.ready.set()
            async for seen in moves:
                move = seen.message
                if (
                    isinstance(move, Transition)
                    and isinstance(move.facts, RunFacts)
                    and move.task == self._task
                ):
                    self._run_moved(move, move.facts, seen.envelope.time)

    def _run_moved(self, move: Transition, facts: RunFacts, at: datetime) -> None:
        if facts.run not in self._steps:
            self._steps[facts.run] = self._next_step
        match move.event:
            case RunEvent.QUORUM_REACHED:
                self._tell(_begun(facts, at))
            case RunEvent.ROUND_FINISHED if facts.rounds:
                self._round_finished(facts, facts.rounds[-1], at)
        if move.target in RUN.final:
            self._tell(_ended(move, facts, at, self._next_step))

    def _round_finished(self, facts: RunFacts, result: RoundResult, at: datetime) -> None:
        step = self._steps[facts.run] + result.round
        self._next_step = max(self._next_step, step)
        self._standings.see(result)
        clients = self._clients(result)
        self._tell(
            RoundSeen(
                run=facts.run,
                task=self._task,
                round=result.round,
                step=step,
                at=at,
                metrics=_figures(result),
                clients=clients,
            )
        )
        for client, figures in clients.items():
            about = {TASK: self._task, CLIENT: client}
            note(CLIENT_RELIABILITY, figures["reliability"], about)
            if (contribution := figures.get("contribution")) is not None:
                note(CLIENT_CONTRIBUTION, contribution, about)

    def _clients(self, result: RoundResult) -> dict[str, dict[str, float]]:
        """What a round was to each client: its own figures, where its time went, and what it is worth by now."""
        asked = sorted(result.participants.keys() | result.failures.keys())[:CLIENTS_TRACKED]
        return {client: result.of_client(client) | self._worth(client) for client in asked}

    def _worth(self, client: str) -> dict[str, float]:
        standing = self._standings.of(client)
        worth = {"reliability": standing.reliability, "contribution": standing.contribution}
        return {name: value for name, value in worth.items() if value is not None}

    def _tell(self, word: Word) -> None:
        for told in self._told:
            told.tell(word)


def _figures(result: RoundResult) -> dict[str, float]:
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


def _begun(facts: RunFacts, at: datetime) -> RunBegun:
    return RunBegun(
        run=facts.run,
        task=facts.task,
        at=at,
        trigger=facts.trigger,
        code_version=facts.code_version,
        config=facts.plan.config,
        trace_id=facts.trace_id,
    )


def _ended(move: Transition, facts: RunFacts, at: datetime, step: int) -> RunEnded:
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
